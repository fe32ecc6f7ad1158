"""Image files of pairs and of packed images: png (lossless), jpeg (small, lossy), raw (uncompressed).

Pillow decodes all and encodes JPEG; what `png` and simplejpeg (`jpeg`) can decode to the same pixels, they do in less
time. torchvision's codecs are deprecated, and an altered PNG file may end the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from copgen_fast.config import Codec as Name
from copgen_fast.errors import CorruptItemError
from copgen_fast.images import decode, jpeg, png

REMEDY = "delete it and run `--stages pairs` again"
_JPEG_QUALITY = 95
_JPEG_444 = 0  # colour at full resolution


class Encoded(NamedTuple):
    """The encoded image files of one item of a data set, as DALI decodes them.

    Attributes:
        index: of the item.
        images: the files.
        corner: top and left of the part that is taken of each.
    """

    index: int
    images: tuple[bytes | memoryview, ...]
    label: int
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Codec:
    """A file format of images.

    Attributes:
        extension: of its files.
        tolerance: levels by which an image may differ from one of the same seed that is generated and encoded again:
            rounding depends on the batch size, and JPEG amplifies it.
        encode: image uint8 [H, W, 3] -> the file's bytes, which depend on the image alone.
    """

    extension: str
    tolerance: int
    encode: Callable[[np.ndarray], bytes]
    _pixels: Callable[[bytes, tuple[int, int, int]], Tensor]
    _rows: Callable[[Sequence[bytes], np.ndarray], list[int]]  # as `png.rgb_rows`
    _size: Callable[[bytes], tuple[int, int] | None]

    def decode(self, data: bytes, shape: tuple[int, int, int], where: str) -> Tensor:
        """Image of a file's bytes, uint8 [3, H, W] with any strides.

        Args:
            shape: (3, H, W), as expected.
            where: name of the file, for the message.

        Raises:
            CorruptItemError: the file does not decode, or has another shape; the message starts with `where`.
        """
        self.expect_size(data, shape, where)
        try:
            return self._pixels(data, shape)
        except ValueError as error:
            raise CorruptItemError(f"{where} does not decode ({error}): {REMEDY}") from error

    def decode_rows(self, files: Sequence[bytes], images: np.ndarray) -> list[int]:
        """Decode files of one size into rows of `images`, uint8 [N, H, W, 3], in less time than one by one.

        Returns:
            the rows of files that don't decode, or have another size: `decode` says what is wrong with them.
        """
        _, height, width, _ = images.shape
        broken = []
        for row in self._rows(files, images):
            try:
                images[row] = self.decode(files[row], (3, height, width), "").permute(1, 2, 0).numpy()
            except CorruptItemError:
                broken.append(row)
        return broken

    def expect_size(self, data: bytes, shape: tuple[int, int, int], where: str) -> None:
        """Check the size that a file's header claims, for decoders that would decode any size.

        Args:
            shape, where: as for `decode`.

        Raises:
            CorruptItemError: it is another one, or too large; the message starts with `where`.
        """
        if not self.has_size(data, shape):
            raise CorruptItemError(f"{where} is {[3, *self._size(data)]}, the index says {list(shape)}: {REMEDY}")

    def has_size(self, data: bytes, shape: tuple[int, int, int]) -> bool:
        """Whether the size that a file's header claims, if it is found, is that of (3, H, W), and not too large."""
        size = self._size(data)
        return size is None or size == tuple(shape[1:]) and size[0] * size[1] <= decode.MAX_PIXELS


def _encode_jpeg(image: np.ndarray) -> bytes:
    # Pillow releases the interpreter's lock only where it writes to a file descriptor.
    with open(os.memfd_create("jpeg"), "w+b", buffering=0) as file:
        Image.fromarray(image).save(file, "jpeg", quality=_JPEG_QUALITY, subsampling=_JPEG_444)
        return os.pread(file.fileno(), file.tell(), 0)


def _decode_png(data: bytes, shape: tuple[int, int, int]) -> Tensor:
    return _decode_by_pillow(data, "PNG", shape)


def _decode_jpeg(data: bytes, shape: tuple[int, int, int]) -> Tensor:
    return _decode_by_pillow(data, "JPEG", shape)


def _decode_by_pillow(data: bytes, format: str, shape: tuple[int, int, int]) -> Tensor:
    return torch.from_numpy(decode.rgb_of_bytes(data, format, shape)).permute(2, 0, 1)


def _decode_raw(data: bytes, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    if len(data) != channels * height * width:
        raise ValueError(f"{len(data)} bytes, {channels * height * width} expected")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)


def _raw_rows(files: Sequence[bytes], images: np.ndarray) -> list[int]:
    left = []
    for row, (data, image) in enumerate(zip(files, images, strict=True)):
        if len(data) == image.size:
            image[:] = np.frombuffer(data, np.uint8).reshape(image.shape)
        else:
            left.append(row)
    return left


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    found = jpeg.frame(data)
    return found and (found.height, found.width)


CODECS: dict[Name, Codec] = {
    "png": Codec("png", 1, png.encode, _decode_png, png.rgb_rows, png.size),
    "jpeg": Codec("jpg", 16, _encode_jpeg, _decode_jpeg, jpeg.rgb_rows, _jpeg_size),
    "raw": Codec("raw", 1, np.ndarray.tobytes, _decode_raw, _raw_rows, lambda data: None),
}
