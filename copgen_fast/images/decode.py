"""Decoding of image files to RGB, bounded before anything is decoded: of photographs and of shards of pairs alike."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from copgen_fast.images import jpeg, png

MAX_PIXELS = 89_478_485
"""The largest image that is decoded, from which on Pillow warns, too; of all threads together as many at a time."""
# Formats of photographs and data sets; Pillow's other decoders run programs (EPS) or are hardly ever used.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "AVIF")
_SMALL = 64 * 64  # pixels
_LARGE = 2**24  # bytes, from which on a file is not read at once
_CONVERTED = ("1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
"""Modes of 8 bits or fewer a channel, whose conversion to RGB keeps the range; transparency is left out."""
_QUICKLY = {"JPEG": jpeg.rgb, "PNG": png.rgb}
"""Decoders to Pillow's pixels of the files that they know, by Pillow's name of the format."""
_ORIENTATION = 0x0112  # EXIF
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
_TURNS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
"""How an image of each EXIF orientation is turned upright."""


class UndecodableImageError(ValueError):
    """An image that can't be read as RGB; the message says why, without the file's name."""


@contextlib.contextmanager
def rgb(path: str | Path | bytes) -> Iterator[np.ndarray]:
    """Decode an image file, or its bytes, to RGB, uint8 [H, W, 3], turned upright as its EXIF orientation says.

    16-bit grey levels are scaled. While the block lasts, its pixels count as being decoded.

    Raises:
        UndecodableImageError: it is damaged, too large, animated, no regular file, or its range of values is unknown.
    """
    with contextlib.ExitStack() as held:
        with _faults_named():
            file = io.BytesIO(path) if isinstance(path, bytes) else held.enter_context(_open_regular(path))
            image = held.enter_context(Image.open(file, formats=_formats()))
            _expect_one_small_frame(image)
            held.enter_context(_decoding.of(image.width * image.height))
            pixels = _turned(_pixels(image, file), image)
        yield pixels


def rgb_of_bytes(data: bytes, format: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image file in memory to RGB, uint8 [H, W, 3], as it lies; 16-bit grey levels are scaled.

    Args:
        data: a file of one image, as `images.codecs` write it.
        format: Pillow's name of it.
        shape: (3, H, W); no other size is decoded.

    Raises:
        UndecodableImageError: as `rgb`, or it is of another size.
    """
    quickly = _QUICKLY.get(format)
    if quickly and (pixels := quickly(data, *shape[1:])) is not None:
        return pixels  # without Pillow's look at the file, which would take as long
    with _faults_named():
        file = io.BytesIO(data)
        image = Image.open(file, formats=[format])
        if (3, image.height, image.width) != tuple(shape):
            raise UndecodableImageError(f"it is {[3, image.height, image.width]}, the index says {list(shape)}")
        _expect_one_small_frame(image)
        return _pixels(image, file)


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    try:
        yield
    except (MemoryError, UndecodableImageError):
        raise
    except Exception as error:  # Pillow's decoders raise anything over damaged files
        raise UndecodableImageError(reason(error)) from error


def _pixels(image: Image.Image, file: IO[bytes]) -> np.ndarray:
    """Pixels of an image that Pillow opened, as `to_rgb`; of a JPEG file by the library that Pillow uses, if it can."""
    pixels = None
    if image.format == "JPEG":
        file.seek(0)
        pixels = jpeg.rgb(file.read(jpeg.most_bytes(image.height, image.width)), image.height, image.width)
    return to_rgb(image) if pixels is None else pixels


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of a Pillow image as uint8 [H, W, 3]; 16-bit grey levels are scaled, where Pillow would clip them.

    Raises:
        UndecodableImageError: values of 32 bits or floating point, whose range no file format defines.
    """
    if image.mode == "RGB":
        return np.array(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.repeat(_grey_levels(image)[..., None], 3, axis=2)
    if image.mode == "La" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode not in _CONVERTED:
        raise _unknown_range(image)
    return np.array(image.convert("RGB"))


def is_small(height: int, width: int) -> bool:
    """Whether one thread reads stored images of this size in less time than two side by side.

    With each image a thread lets the other one run Python, and waits for its turn again. On two cores, files in memory,
    two threads took 1.0 to 2.8 times as long for PNG and JPEG images of 16 to 48 px, 0.65 to 0.95 for 64 to 128 px.
    """
    return height * width < _SMALL


def reason(error: Exception) -> str:
    """What an error says, on one line and without a file's name or address."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image of a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # older Pillow has no AVIF


def _open_regular(path: str | Path) -> IO[bytes]:
    """A regular file, in memory unless it is large: Pillow reads it in dozens of pieces."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a FIFO would wait for a writer
        raise UndecodableImageError("it is no regular file")
    file = open(path, "rb")
    if found.st_size > _LARGE:
        return file
    with file:
        return io.BytesIO(file.read())


def _expect_one_small_frame(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableImageError(
            f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
        )
    # MPO is a camera's JPEG with previews behind the photograph.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UndecodableImageError("it holds several frames or pages, and which one is meant is unknown")


def _grey_levels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of an image of more than 8 bits, from 0 .. the largest value that its file can hold."""
    top, inverted = 65535, False
    if image.format == "TIFF":
        top = 2 ** image.tag_v2.get(_BITS, (16,))[0] - 1
        inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # which Pillow reads as 0 .. 65535
        raise _unknown_range(image)
    levels = (np.asarray(image).astype(np.uint32).clip(0, top) * 255 + top // 2) // top
    return (255 - levels if inverted else levels).astype(np.uint8)


def _unknown_range(image: Image.Image) -> UndecodableImageError:
    return UndecodableImageError(
        f"Pillow's mode {image.mode} has no defined range of values: save it with 8 or 16 bits a channel"
    )


def _turned(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF data beside a sound image
        orientation = image.getexif().get(_ORIENTATION)
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


class _Budget:
    """Lets threads wait until the pixels that all of them decode are few enough."""

    def __init__(self, pixels: int) -> None:
        self._left, self._changed = pixels, threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


_decoding = _Budget(MAX_PIXELS)
