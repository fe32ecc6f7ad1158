import io

import pytest
from PIL import Image

from copgen_fast.stages.report import figures


def decoded(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_lines_and_bars_are_pictures_with_ink():
    series = {"one": ([0, 1, 2], [1.0, 4.0, 2.0]), "two": ([0, 1, 2], [0.0, 1.0, 0.0])}
    for png in (
        figures.lines(series, "x", "y"),
        figures.lines(series, "x", "y", level=3.0, level_name="delta"),
        figures.bars({"a": 0.5, "b": 0.9}, {"a": 0.1, "b": 0.0}, "top-1"),
    ):
        picture = decoded(png)
        assert picture.size[0] > 600
        assert len(picture.getcolors(1 << 24)) > 50


def test_the_same_numbers_give_the_same_bytes():
    series = {"one": ([0, 1], [1.0, 2.0])}
    assert figures.lines(series, "x", "y") == figures.lines(series, "x", "y")


def test_more_lines_than_colours_still_draw():
    assert figures.lines({str(n): ([0, 1], [n, n]) for n in range(9)}, "x", "y")


def test_a_bar_without_its_spread_is_an_error():
    with pytest.raises(KeyError):
        figures.bars({"a": 0.5}, {}, "top-1")
