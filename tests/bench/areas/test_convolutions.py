"""The area convolutions of `python -m bench`: its rows; its methods are tested with the generators'"""

from bench.areas import convolutions as area


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (area.Case(2, 4, 3, 2),))
    rows = measured("convolutions")
    assert {row["peer"] for row in rows} == set(area.METHODS) - {"one transposed 4 x 4 convolution"}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
