"""One part of a data set, training or test: its labels at once, its images when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from copgen_fast.errors import UsageError
from copgen_fast.images import decode
from copgen_fast.runtime.memory import available_memory

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises
_LONGEST = 4  # of an image's sides, in shorter ones: the centre of a longer one is resized alone


@dataclass(frozen=True)
class Fault:
    """An image that can't be decoded: where it is, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} ({self.why})"


@dataclass(frozen=True)
class Decoded:
    """Images uint8 [N, 3, S, S] and labels int64 [N] of what could be decoded, and what could not."""

    images: Tensor
    labels: Tensor | None
    faults: list[Fault]


@dataclass(frozen=True)
class ArraySplit:
    """Images that lie in one array.

    Attributes:
        labels: int64 [N]; None: labels were not requested.
        load: returns the images of a size, uint8 [N, 3, S, S].
        file_bytes: held beside the resized images.
    """

    count: int
    labels: Tensor | None
    load: Callable[[int], Tensor]
    file_bytes: int = 0
    classes: tuple[str, ...] | None = None

    def decode(self, size: int) -> Decoded:
        """All images, resized to `size`."""
        return Decoded(self.load(size), self.labels, [])

    def first_fault(self) -> Fault | None:
        """What is wrong with the first image."""
        return None


@dataclass(frozen=True)
class ItemSplit:
    """Images that are read one by one.

    Attributes:
        items: (path or Pillow image, label) by index.
        labels: int64 [N]; None: only reading the items tells them.
        name: of the data set, for items that have no path.
        classes: names of the classes, where the files tell them.
    """

    items: Sequence[tuple[Any, int]]
    labels: Tensor | None
    name: str
    classes: tuple[str, ...] | None = None
    file_bytes: int = 0

    @property
    def count(self) -> int:
        return len(self.items)

    def decode(self, size: int) -> Decoded:
        """All images, their shorter side resized to `size` and the centre cropped; in threads, as Pillow releases the
        interpreter's lock.
        """
        images = torch.empty(self.count, 3, size, size, dtype=torch.uint8)
        labels = torch.full((self.count,), -1)

        def read(block: range) -> list[tuple[int, Fault]]:
            found = []
            for index in block:
                fault = self._decode_one(index, size, images[index], labels)
                found += [] if fault is None else [(index, fault)]
            return found

        blocks = [range(start, min(start + 256, self.count)) for start in range(0, self.count, 256)]
        with ThreadPoolExecutor() as pool:
            faults = dict(fault for found in pool.map(read, blocks) for fault in found)
        if faults:
            kept = torch.tensor([index for index in range(self.count) if index not in faults], dtype=torch.int64)
            images, labels = images[kept], labels[kept]
        return Decoded(images, labels, list(faults.values()))

    def first_fault(self) -> Fault | None:
        """What is wrong with the first image."""
        return self._decode_one(0, 1, torch.empty(3, 1, 1, dtype=torch.uint8), torch.empty(1, dtype=torch.int64))

    def _decode_one(self, index: int, size: int, out: Tensor, labels: Tensor) -> Fault | None:
        where = f"image {index} of {self.name}"
        try:
            image, labels[index] = self.items[index]
            if isinstance(image, Image.Image):
                out.copy_(_resized(decode.to_rgb(image), size))
            else:
                where = str(image)
                with decode.rgb(image) as pixels:
                    out.copy_(_resized(pixels, size))
        except _UNREADABLE as error:
            return Fault(where, decode.reason(error))
        return None


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, size, size]."""
    return resize_and_crop(torch.from_numpy(pixels).movedim(2, 0)[None], size)[0]


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """uint8 [N, 1 or 3, H, W] -> contiguous uint8 [N, 3, size, size]: shorter side resized, centre cropped."""
    longest = _LONGEST * min(images.shape[2:])
    if max(images.shape[2:]) > longest:  # the whole of 1 x 60,000 pixels, resized, would take gigabytes
        top, left = (max(0, side - longest) // 2 for side in images.shape[2:])
        images = images[:, :, top : top + longest, left : left + longest]
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = (round(height * scale), round(width * scale))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for block, out in zip(images.split(1024), resized.split(1024), strict=True):  # bounds temporary memory
        if shape != (height, width):
            block = F.interpolate(block, size=shape, mode="bicubic", align_corners=False, antialias=True)
        out.copy_(block[:, :, top : top + size, left : left + size])
    return resized


def expect_memory(count: int, size: int, file_bytes: int = 0) -> None:
    """Refuse before decoding what would not fit into memory, with `file_bytes` that are held at the same time."""
    needed, free = (3 * count * size**2 + file_bytes) / 1e6, available_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UsageError(
            f"{count} images of {size} px take {needed / 1e3:.3g} GB and {free / 1e3:.3g} GB of memory are free: "
            "lower --data.image-size or take fewer images"
        )


Split = ArraySplit | ItemSplit
