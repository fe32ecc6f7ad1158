"""The area codecs of `python -m bench`: its rows and its arithmetic; no time is asserted."""

import dataclasses
import math

import numpy as np
import pytest

from bench.areas import codecs as area
from copgen_fast.images.codecs import CODECS
from tests.helpers.pairs_fixtures import CONFIG, write


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", tuple(area.Case(codec, 2, 16) for codec in CODECS))
    rows = measured("codecs")
    assert [(row["case"], row["direction"]) for row in rows] == [
        (f"{codec} B=2 16px", direction) for codec in CODECS for direction in ("encode", "decode")
    ]
    assert all("bytes an image; 1.3M pairs" in row["limit"] for row in rows)
    assert rows[-1]["limit"].partition("(")[2].startswith("768 bytes")


def test_photographs_are_full_of_detail_and_always_the_same():
    images = area.photographs(6, 32)
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images, area.photographs(6, 32))
    assert all(image.std() > 20 for image in images)


def test_the_size_on_disk_is_that_of_shards(tmp_path):
    config = dataclasses.replace(CONFIG, codec="raw", count=100, shard_size=100)
    write(tmp_path, config)
    found = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    size = math.prod((3, 8, 8))
    expected = area.stored_bytes(size, 100) - 100 * 2 * 4 * (120 - 4)  # latents of 4, not 120
    assert found == pytest.approx(expected, rel=0.3)


def test_hours_are_of_both_images_of_a_pair():
    assert area.core_hours(3.6, pairs=1000) == pytest.approx(2e-3)
