"""The area online of `python -m bench`: its rows; no time is asserted."""

from bench.areas import online as area
from copgen_fast.config import EncoderConfig


def test_the_command_writes_its_rows(monkeypatch, measured):
    tiny = area.Case(area.digits, batch=4, steps=1, epoch=2, encoder=EncoderConfig("resnet18", "half", 8))
    monkeypatch.setattr(area, "CASES", (tiny,))
    rows = measured("online")
    assert {row["case"] for row in rows} == {"digits, resnet18/8 B=4, 1 steps"}
    peers = {row["peer"].removeprefix("same steps, ") for row in rows}
    assert peers == {"PNG shards", "raw shards", "batch at hand"}
    assert all(row["n"] >= 7 and row["direction"] == "step" for row in rows)


def test_random_bigbigan_makes_images():
    assert area.bigbigan().image_shape == (3, 32, 32)
