"""What is taken of a photograph: functions of its pixels, uint8 [H, W, 3], and its index to uint8 [3, S, S].

All resize with antialiasing, as Pillow does, within a level of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.runtime import seeds

Mode = Literal["bilinear", "bicubic"]
_LONGEST = 4  # of an image's sides, in shorter ones: the centre of a longer one is resized alone
_TRIALS = 10  # of a random crop that does not fit, as torchvision has it


class View(Protocol):
    """What is taken of an image; hashable, so that results can be kept by it."""

    size: int

    def __call__(self, pixels: np.ndarray, index: int) -> Tensor:
        """uint8 [H, W, 3] of image `index` -> uint8 [3, size, size]."""


@dataclass(frozen=True)
class Centre:
    """The centre of `size` pixels, once the shorter side is resized to `shorter`, or to `size` where that is None."""

    size: int
    shorter: int | None = None
    mode: Mode = "bicubic"

    def __call__(self, pixels: np.ndarray, index: int = 0) -> Tensor:
        corner = self.corner(pixels.shape[:2])
        if corner is None:
            return resize_and_crop(_channels_first(pixels), self.size, self.shorter, self.mode)[0]
        top, left = corner
        image = np.empty((3, self.size, self.size), np.uint8)  # which numpy fills in half of PyTorch's time, or less
        image[:] = pixels[top : top + self.size, left : left + self.size].transpose(2, 0, 1)
        return torch.from_numpy(image)

    def corner(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Top and left of the part that is taken of an image [H, W] as it is; None: it is resized first."""
        if min(shape) != (self.shorter or self.size) or max(shape) > _LONGEST * min(shape):
            return None
        return _corner(shape, self.size)


@dataclass(frozen=True)
class Whole:
    """The whole image, [3, H, W], its shorter side resized to `size` where it is longer; what `Centre` sees of it."""

    size: int
    mode: Mode = "bicubic"

    def __call__(self, pixels: np.ndarray, index: int = 0) -> Tensor:
        # Channels last as PyTorch knows them: what is stored has channels last, too, so that nothing is copied.
        image = _without_ends(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2))
        shape = tuple(image.shape[2:])
        return _resize(image, _resized(shape, min(self.size, *shape)), self.mode)[0]


@dataclass(frozen=True)
class Squash:
    """The whole image, resized to a square whatever its shape."""

    size: int
    mode: Mode = "bilinear"

    def __call__(self, pixels: np.ndarray, index: int = 0) -> Tensor:
        return resize_pixels(pixels, (self.size, self.size), self.mode)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the image, resized to a square and mirrored by chance (torchvision's RandomResizedCrop).

    Attributes:
        key: seeds what is drawn, together with the image's index; give every epoch its own.
        scale: range of the part's area, in areas of the image.
        ratio: range of its width / height, drawn evenly in logarithms.
        flip: probability of a horizontal flip.
        crop: False takes the whole image, squashed, and only flips.
    """

    size: int
    key: tuple[seeds.Key, ...]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mode: Mode = "bilinear"
    crop: bool = True

    def __call__(self, pixels: np.ndarray, index: int) -> Tensor:
        drawn = torch.rand(3, _TRIALS, generator=seeds.generator(*self.key, index), dtype=torch.float64)
        areas, shapes, at = drawn.tolist()  # each operator of PyTorch's lets another thread in, which takes its time
        if self.crop:
            top, left, height, width = self._box(pixels.shape[:2], areas, shapes, at)
            pixels = pixels[top : top + height, left : left + width]
        image = resize_pixels(pixels, (self.size, self.size), self.mode)
        return image.flip(2) if at[-1] < self.flip else image

    def _box(
        self, shape: tuple[int, int], areas: list[float], shapes: list[float], at: list[float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width: of the first trial that fits, else of the largest centre of an allowed ratio."""
        rows, columns = shape
        low, high = map(math.log, self.ratio)
        for area, form in zip(areas, shapes, strict=True):
            pixels = rows * columns * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + form * (high - low))
            height, width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
            if 0 < height <= rows and 0 < width <= columns:
                return int(at[0] * (rows - height + 1)), int(at[1] * (columns - width + 1)), height, width
        height = min(rows, max(1, round(columns / self.ratio[0])))
        width = min(columns, max(1, round(rows * self.ratio[1])))
        return (rows - height) // 2, (columns - width) // 2, height, width


@dataclass(frozen=True)
class Several:
    """Several views of one image, which is decoded once: their channels one after the other, [3 K, size, size]."""

    views: tuple[View, ...]

    @property
    def size(self) -> int:
        """Of all of them."""
        return self.views[0].size

    def __call__(self, pixels: np.ndarray, index: int) -> Tensor:
        taken = [view(pixels, index) for view in self.views]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


def resize_and_crop(images: Tensor, size: int, shorter: int | None = None, mode: Mode = "bicubic") -> Tensor:
    """uint8 [N, 1 or 3, H, W] -> contiguous uint8 [N, 3, size, size]: shorter side resized, centre cropped.

    Args:
        shorter: what the shorter side is resized to, `size` or more; None: to `size`.
    """
    images = _without_ends(images)
    shape = _resized(tuple(images.shape[2:]), shorter or size)
    top, left = _corner(shape, size)
    if shape == tuple(images.shape[2:]):
        return images[:, :, top : top + size, left : left + size].expand(-1, 3, -1, -1).contiguous()
    resized = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for block, out in zip(images.split(1024), resized.split(1024), strict=True):  # bounds temporary memory
        out.copy_(_resize(block, shape, mode)[:, :, top : top + size, left : left + size])
    return resized


def _resized(shape: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Height and width once the shorter side is `shorter`; the longer one is rounded down, as torchvision does."""
    return tuple(shorter * side // min(shape) for side in shape)


def _corner(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Top and left of the centre, a half rounded to the even side, as torchvision's CenterCrop does."""
    return tuple(round((side - size) / 2) for side in shape)


def _without_ends(images: Tensor) -> Tensor:
    """The middle of images that are very long: the whole of 1 x 60,000 pixels, resized, would take gigabytes."""
    longest = _LONGEST * min(images.shape[2:])
    if max(images.shape[2:]) <= longest:
        return images
    top, left = (max(0, side - longest) // 2 for side in images.shape[2:])
    return images[:, :, top : top + longest, left : left + longest]


def resize_pixels(pixels: np.ndarray, shape: tuple[int, int], mode: Mode = "bilinear") -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, *shape]."""
    return _resize(_channels_first(pixels), shape, mode)[0]


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None])


def _resize(images: Tensor, shape: tuple[int, int], mode: Mode) -> Tensor:
    if shape == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=shape, mode=mode, align_corners=False, antialias=True)
