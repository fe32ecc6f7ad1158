"""The area convolutions of `python -m bench`: its rows; its methods are tested with the generators'"""

from bench.areas import convolutions as area


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (area.Case(2, 4, 3, 2), area.Case(2, 3, 3, 4, upsampled=False)))
    rows = measured("convolutions")
    upsampled = {row["peer"] for row in rows if row["case"].startswith("upsampled")}
    assert upsampled == set(area.METHODS) - {"one transposed 4 x 4 convolution"}
    assert {row["peer"] for row in rows} - upsampled == {"Winograd, F(2 x 2, 3 x 3)"}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
