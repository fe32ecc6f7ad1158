"""Decoding of JPEG files by simplejpeg, where it is installed: Pillow's pixels to the bit, in two thirds of the time.

Both call libjpeg-turbo, whose decoder gives the same pixels of sequential files in all versions and on all processors.
Pillow hands rows over one by one, in 4 bytes a pixel, and copies them twice on the way to an array. What libjpeg-turbo
warns of, and what only some builds of it decode, is left to Pillow, so that no result or message depends on what is
installed.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, features

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_MARKER = 0xFF
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the others there are tables
_SEQUENTIAL = (0xC0, 0xC1)  # progressive ones that lack scans differ by version, others need libraries built for them
_COLOURS = ("Gray", "YCbCr")
_SUBSAMPLINGS = ("444", "422", "420", "440", "411")


@functools.cache
def available() -> bool:
    """Whether simplejpeg is installed and gives Pillow's pixels of noise: Pillow can be built with another library."""
    if simplejpeg is None or not features.check("jpg"):
        return False
    image = np.random.default_rng(0).integers(0, 256, (35, 37, 3), dtype=np.uint8)
    files = [simplejpeg.encode_jpeg(image, 75, colorsubsampling=name) for name in _SUBSAMPLINGS]
    return all(np.array_equal(simplejpeg.decode_jpeg(file), np.array(Image.open(io.BytesIO(file)))) for file in files)


class Frame(NamedTuple):
    """What a file's frame header says: its marker, which tells the kind of coding, and the size in pixels."""

    marker: int
    height: int
    width: int


def frame(data: bytes) -> Frame | None:
    """The frame header of a JPEG file; None: it has none."""
    place = 2
    while place + 9 <= len(data) and data[place] == _MARKER:
        marker, length, _, height, width = struct.unpack_from(">xBHBHH", data, place)
        if marker in _FRAMES:
            return Frame(marker, height, width)
        place += 1 if marker == _MARKER else 2 + length  # any marker may follow bytes that fill up
    return None


def most_bytes(height: int, width: int) -> int:
    """Bytes of the largest file that `rgb` need be given; of a larger one that many, which it leaves to Pillow."""
    return 4 * height * width + 2**20


def rgb(data: bytes, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray | None:
    """Pillow's pixels of a sequential file of this size, grey or YCbCr, uint8 [H, W, 3]; None: left to Pillow.

    Args:
        out: where they are written, contiguous; of a file that is left to Pillow maybe a part of them.
    """
    found = frame(data) if available() else None
    if found is None or found.marker not in _SEQUENTIAL:
        return None
    try:
        rows, columns, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (rows, columns) == (height, width) and colours in _COLOURS:
            return simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except Exception:  # an error or a warning, of whatever type: KeyError for a subsampling without a name
        pass
    return None


def rgb_rows(files: Sequence[bytes], images: np.ndarray) -> list[int]:
    """`rgb` of files of one size into rows of `images`, uint8 [N, H, W, 3]; returns those that are left to Pillow."""
    _, height, width, _ = images.shape
    return [row for row, data in enumerate(files) if rgb(data, height, width, images[row]) is None]
