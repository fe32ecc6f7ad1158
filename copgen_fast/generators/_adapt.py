"""Anyone's module z -> image as a `Generator`: its latents flattened, its images picked, scaled and made colour."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from copgen_fast.errors import UsageError, explain, in_one_line
from copgen_fast.generators._interface import expect_labels, failed

RANGES = ((-1, 1), (0, 1))
_TRIED = 16
"""Shapes of latents that are tried where none is declared."""


class Adapted(nn.Module):
    """A module that maps latents of any shape to images, called as every `Generator` is.

    What it may declare, as attributes: `latent_dim` L (forward takes [N, L]) or `latent_shape` (forward takes
    [N, *latent_shape]); `image_range`; `image_key`, the image's key or index in a dict or tuple of several; and what
    every `Generator` may have.
    """

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.classes = getattr(generator, "classes", 0)
        self.image_range = getattr(generator, "image_range", None)
        self.image_key = getattr(generator, "image_key", None)
        self.labelled = bool(self.classes) or takes_labels(generator)
        if self.image_range is not None:
            if not isinstance(self.image_range, (tuple, list)) or tuple(self.image_range) not in RANGES:
                raise UsageError(f"image_range: expected (-1, 1) or (0, 1), got {self.image_range!r}")
            self.image_range = tuple(self.image_range)
        declared = self._declared_shape()
        self.found_by_trying = declared is None
        self.inner_shape = self._working_shape() if declared is None else declared
        shape = getattr(generator, "latent_shape", None)  # beside latent_dim: what a flat latent stands for
        self.latent_shape = self.inner_shape if shape is None else tuple(shape)
        self.latent_dim = getattr(generator, "latent_dim", math.prod(self.inner_shape))
        for name in ("latent_groups", "prior"):
            if hasattr(generator, name):
                setattr(self, name, getattr(generator, name))
        if hasattr(generator, "sample"):
            self.sample = generator.sample
        self.image_shape = self._image_shape()

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] (and labels) to images [N, 3, H, W] in [-1, 1].

        Raises:
            ValueError: labels that there should not be, or that are missing; no image in what the module returns.
        """
        expect_labels(labels, len(z), self.classes)
        return self._images(z.reshape(len(z), *self.inner_shape), labels)

    def _images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        images = pick(self.generator(z, labels) if self.labelled else self.generator(z), len(z), self.image_key)
        if not isinstance(images, Tensor):  # named by the checks
            return images
        if images.is_floating_point():
            images = images.to(z.dtype)  # of a network that computes in another precision
        if self.image_range == (0, 1):
            images = 2 * images - 1
        return images.expand(-1, 3, -1, -1) if images.ndim == 4 and images.shape[1] == 1 else images

    def _declared_shape(self) -> tuple[int, ...] | None:
        """What forward takes beside N: by `latent_dim`, `latent_shape`, or a draw of the module's own `sample`."""
        module = self.generator
        if (length := getattr(module, "latent_dim", None)) is not None:
            if not isinstance(length, int) or length < 1:
                raise UsageError(f"latent_dim: expected the length of a latent, 1 or more, got {length!r}")
            return (length,)
        if (shape := getattr(module, "latent_shape", None)) is not None:
            if not isinstance(shape, (tuple, list)) or not all(isinstance(x, int) and x > 0 for x in shape):
                raise UsageError(f"latent_shape: expected sizes, 1 or more each, got {shape!r}")
            return tuple(shape)
        if not hasattr(module, "sample"):
            return None
        if not isinstance(z := _drawn(module.sample, 0, 1), Tensor) or z.ndim < 2:
            raise UsageError(f"sample(0, 1): expected floating-point latents [1, ...], got {_described(z)}")
        return tuple(z.shape[1:])

    def _working_shape(self) -> tuple[int, ...]:
        """The first shape, by the sizes of the module's first layers, of which it makes images."""
        tried = []
        for shape in _candidates(self.generator):
            try:
                self._trial(shape)
                return shape
            except UsageError as error:
                tried.append(str(error))
        raise UsageError(
            "latent_dim: expected the length of a latent, 1 or more, or latent_shape, got neither, and no shape of its "
            f"first layers makes images: declare one{f' ({tried[0]})' if tried else ''}"
        )

    def _image_shape(self) -> Any:
        """As declared, with three channels for one; undeclared, that of an image."""
        if (shape := getattr(self.generator, "image_shape", None)) is None:
            return tuple(self._trial(self.inner_shape).shape[1:])
        return (3, *shape[1:]) if len(shape) == 3 and shape[0] == 1 else shape

    @torch.no_grad()
    def _trial(self, shape: tuple[int, ...]) -> Tensor:
        """Images [2, C, H, W] of two latents of a shape; UsageError where it fails."""
        device = next((tensor.device for tensor in self.generator.state_dict().values()), torch.device("cpu"))
        labels = torch.zeros(2, dtype=torch.int64, device=device) if self.classes else None
        z = torch.zeros(2, *shape, device=device)
        try:
            with torch.random.fork_rng(devices=[]):
                images = self._images(z, labels)
        except Exception as error:
            raise failed(error, self, z, labels) from error
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != 2:
            raise UsageError(f"images of latents {[2, *shape]}: expected [2, 3, H, W], got {_described(images)}")
        return images


def takes_labels(generator: nn.Module) -> bool:
    """Whether forward has a parameter `labels`."""
    return "labels" in inspect.signature(generator.forward).parameters


def pick(output: Any, count: int, key: Any = None) -> Any:
    """The images in what a module returns: itself, or of a dict or tuple the entry `key` or the only image.

    Raises:
        ValueError: there is no such entry, or no image, or several.
    """
    if not isinstance(output, (Mapping, tuple, list)):
        return output
    entries = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
    what = f"a {type(output).__name__} of {list(entries)}"
    if key is not None:
        if key not in entries:
            raise ValueError(f"image_key: {key!r} is not in {what}")
        return entries[key]
    images = [value for value in entries.values() if _looks_like_images(value, count)]
    if len(images) != 1:
        raise ValueError(f"{what}, with {len(images)} images: set image_key, or return the images alone")
    return images[0]


def _looks_like_images(value: Any, count: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 4:
        return False
    return len(value) == count and value.shape[1] in (1, 3)


def _candidates(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of latents by layers' weights: Linear [out, in], ConvTranspose [in, out, k, k], Conv [out, in, k, k]."""
    seen: dict[tuple[int, ...], None] = {}
    for weight in (x for x in module.state_dict().values() if isinstance(x, Tensor) and x.ndim in (2, 4)):
        sizes = [(weight.shape[1],)] if weight.ndim == 2 else [(size, 1, 1) for size in weight.shape[:2]]
        seen |= dict.fromkeys(sizes)
    yield from list(seen)[:_TRIED]


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def _drawn(sample: Callable[[int, int], Any], seed: int, count: int) -> Any:
    """What a user's sample(seed, n) returns; torch's global generator is seeded before and restored after.

    Raises:
        UsageError: it fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return sample(seed, count)
        except Exception as error:
            raise explain(error) or UsageError(f"sample({seed}, {count}): {in_one_line(error)}") from error


@dataclass(frozen=True)
class OwnPrior:
    """A generator's own `sample(seed, n)`, with its latents checked and flattened.

    Attributes:
        draw_each: its `sample_each(seeds)`, one latent a seed, with the bits of sample(seed, 1), if any.
    """

    draw: Callable[[int, int], Tensor]
    latent_dim: int
    draw_each: Callable[[Sequence[int]], Tensor] | None = None

    def __call__(self, seed: int, count: int) -> Tensor:
        """Draw latents float32 [count, latent_dim] on the CPU.

        Raises:
            UsageError: it returns something else.
        """
        z = _drawn(self.draw, seed, count)
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.numel() != count * self.latent_dim:
            wanted = f"floating-point latents of {count} x {self.latent_dim} numbers"
            raise UsageError(f"sample({seed}, {count}): expected {wanted}, got {_described(z)}")
        return z.reshape(count, self.latent_dim).float().cpu()

    def each(self, seeds: Sequence[int]) -> Tensor:
        """One latent per seed, float32 [N, latent_dim] on the CPU."""
        return self.draw_each(seeds) if self.draw_each else torch.cat([self(seed, 1) for seed in seeds])
