"""Augmentation policies, and the random parameters of a batch that are drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor

from copgen_fast.ops.checks import as_count, expect_tensor
from copgen_fast.ops.rand_augment.params import RandAugmentParams, RandAugmentPolicy

_CROP_TRIES = 10
# Of ratios, widths and strengths; beyond them sizes and factors are no numbers in float32.
_SMALLEST, _LARGEST = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True)
class AugmentPolicy:
    """Probabilities and strengths of an augmentation; the default only normalises.

    Attributes:
        crop_scale: area of the crop as a share of the image, uniform in (low, high); None keeps the image.
        crop_ratio: aspect ratio width / height of the crop, log-uniform in (low, high).
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: strengths s >= 0; the factor is uniform in [max(0, 1 - s), 1 + s].
        hue: strength h in [0, 0.5]; the shift is uniform in [-h, h] turns.
        jitter: probability that the four above are applied, in random order.
        gray: probability of turning gray, after the jitter.
        blur: probability of a Gaussian blur, after the gray; its kernel spans a tenth of the view's shorter side
            (SimCLR, arXiv:2002.05709, appendix A), 2 floor(side / 20) + 1 pixels and at least 3.
        blur_sigma: standard deviation of the blur in pixels of the view, uniform in (low, high).
        rand_augment: RandAugment's operations, after the blur; the gray then comes after them. None: no RandAugment.
        solarize: probability of inverting the channels that are at least `solarize_threshold`, after all of these
            (BYOL, arXiv:2006.07733, appendix B).
        mean, std: per-channel normalisation that ends the pipeline (default ImageNet's).

    Raises:
        ValueError: a field out of its range, at most 1e-6 to 1e6; the message names it.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    rand_augment: RandAugmentPolicy | None = None
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.crop_scale is not None:
            _expect_range("crop_scale", self.crop_scale, highest=1.0)
        _expect_range("crop_ratio", self.crop_ratio)
        _expect_range("blur_sigma", self.blur_sigma)
        limits = dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize", "solarize_threshold"), 1.0)
        limits["hue"] = 0.5
        limits |= dict.fromkeys(("brightness", "contrast", "saturation"), _LARGEST)
        for name, highest in limits.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= highest:
                raise ValueError(f"{name}: expected a number from 0 to {highest:g}, got {value!r}")
        for name, value in zip(("mean", "std"), as_statistics(self.mean, self.std), strict=True):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """Random parameters of N views: plain tensors on one device.

    Attributes:
        crop: int64 [N, 4], (top, left, height, width) in pixels of the input.
        flip: bool [N].
        order: int64 [N, 4], a permutation a row: the ops in the order they are applied
            (0 brightness, 1 contrast, 2 saturation, 3 hue).
        factors: float32 [N, 4], of brightness, contrast, saturation (1 is neutral) and hue (0 is neutral).
        jitter: bool [N], whether the four ops are applied at all.
        gray: bool [N].
        blur: float32 [N, 2R + 1], weights of the blur along each axis, (..., 0, 1, 0, ...) for none;
            the width is the same for the whole batch, and R = 0 costs nothing.
        solarize: float32 [N], the value from which a channel is inverted; infinity for never.
        rand_augment: of N views; None for no RandAugment.

    Raises:
        TypeError, ValueError: a tensor of another dtype or shape; the message names it.
    """

    crop: Tensor
    flip: Tensor
    order: Tensor
    factors: Tensor
    jitter: Tensor
    gray: Tensor
    blur: Tensor
    solarize: Tensor
    rand_augment: RandAugmentParams | None = None

    def __post_init__(self) -> None:
        expect_tensor("crop", self.crop, ("N", 4), (torch.int64,))
        n = len(self.crop)
        expect_tensor("order", self.order, (n, 4), (torch.int64,))
        expect_tensor("factors", self.factors, (n, 4), (torch.float32,))
        expect_tensor("solarize", self.solarize, (n,), (torch.float32,))
        expect_tensor("blur", self.blur, (n, "2R + 1"), (torch.float32,))
        if self.blur.shape[1] % 2 == 0:
            raise ValueError(f"blur: expected an odd number of weights, got {self.blur.shape[1]}")
        for name in ("flip", "jitter", "gray"):
            expect_tensor(name, getattr(self, name), (n,), (torch.bool,))
        if self.rand_augment is not None and len(self.rand_augment) != n:
            raise ValueError(f"rand_augment: expected {n} rows, got {len(self.rand_augment)}")

    @classmethod
    def sample(
        cls,
        batch: int,
        image_size: tuple[int, int],
        policy: AugmentPolicy,
        *,
        out_size: int | tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> AugmentParams:
        """Draw parameters for `batch` views of images of `image_size` (H, W) by torchvision's rules.

        Every policy uses up the same 33 uniform numbers a view, 3 more at the end if it blurs or solarises, and then 5
        for each step of RandAugment: two policies drawn from one generator state agree in what they share. Nothing
        waits for the device.

        Args:
            out_size: size of the views (None: `image_size`); the blur's kernel is a share of it.
            generator: draws come from it, on its own device, and are then moved to `device`: a CPU
                generator gives every device the same parameters. None is the default one of `device`.

        Raises:
            ValueError: a negative batch or an image size that is not two positive integers.
        """
        batch = as_count("batch", batch)
        image_size = as_size("image_size", image_size)
        out_size = image_size if out_size is None else as_size("out_size", out_size)
        source = torch.device(device) if generator is None else generator.device

        # A compiled function of any batch size knows no generator=None.
        options = {} if generator is None else {"generator": generator}

        def draw(count: int) -> Tensor:
            # Doubles, so that scaling to an integer range never rounds up to its end.
            return torch.rand(batch, count, device=source, dtype=torch.float64, **options).to(device)

        uniform = draw(2 * _CROP_TRIES + 13)
        tries, place, order, factors, gates = uniform.split([2 * _CROP_TRIES, 2, 4, 4, 3], dim=1)
        lows, highs = zip(*_factor_ranges(policy), strict=True)
        factors = [low + u * (high - low) for u, low, high in zip(factors.unbind(1), lows, highs, strict=True)]
        filters, rand = _draw_filters(draw, policy, min(out_size)), policy.rand_augment
        return cls(
            crop=_draw_crops(tries, place, image_size, policy),
            flip=gates[:, 0] < policy.flip,
            order=order.argsort(dim=1),
            factors=torch.stack(factors, dim=1).float(),
            jitter=gates[:, 1] < policy.jitter,
            gray=gates[:, 2] < policy.gray,
            **filters,
            rand_augment=None if rand is None else RandAugmentParams.from_uniform(draw(5 * rand.steps), rand),
        )

    @classmethod
    def neutral(
        cls, batch: int, image_size: int | tuple[int, int], device: torch.device | str = "cpu"
    ) -> AugmentParams:
        """Parameters that change nothing: the whole image, and each op as the identity."""
        batch, (height, width) = as_count("batch", batch), as_size("image_size", image_size)
        never = torch.zeros(batch, dtype=torch.bool, device=device)
        return cls(
            crop=torch.tensor([0, 0, height, width], device=device).repeat(batch, 1),
            flip=never,
            order=torch.arange(4, device=device).repeat(batch, 1),
            factors=torch.tensor([1.0, 1.0, 1.0, 0.0], device=device).repeat(batch, 1),
            jitter=never.clone(),
            gray=never.clone(),
            blur=torch.ones(batch, 1, device=device),
            solarize=torch.full((batch,), math.inf, device=device),
        )

    @classmethod
    def cat(cls, parts: Sequence[AugmentParams]) -> AugmentParams:
        """Concatenate the parameters of several batches, all with RandAugment or all without."""
        names = [field.name for field in fields(cls) if field.name != "rand_augment"]
        rand = [part.rand_augment for part in parts if part.rand_augment is not None]
        if 0 < len(rand) < len(parts):
            raise ValueError("parts: expected RandAugment in all of them or in none")
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return cls(*joined, rand_augment=RandAugmentParams.cat(rand) if rand else None)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.crop.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AugmentParams:
        """Move to `device`; `non_blocking` as for a tensor."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AugmentParams:
        """Copy to page-locked memory, from which transfers to a GPU are asynchronous."""
        return self.map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return len(self.crop)

    def __getitem__(self, rows: slice) -> AugmentParams:
        """Parameters of some of the views."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> AugmentParams:
        """A copy with `change` applied to every tensor."""
        names = (field.name for field in fields(self) if field.name != "rand_augment")
        rand = None if self.rand_augment is None else self.rand_augment.map(change)
        return AugmentParams(*(change(getattr(self, name)) for name in names), rand_augment=rand)


def _draw_crops(tries: Tensor, place: Tensor, image_size: tuple[int, int], policy: AugmentPolicy) -> Tensor:
    """torchvision's RandomResizedCrop, all tries at once: uniform numbers [N, 20], [N, 2] -> int64 [N, 4].

    A try draws an area and an aspect ratio; the first whose box fits the image is taken, and placed
    uniformly. Where none fits, the largest centred box within the ratio range.
    """
    height, width = image_size
    if policy.crop_scale is None:
        return torch.stack([torch.full_like(place[:, 0], side, dtype=torch.int64) for side in (0, 0, height, width)], 1)
    (low, high), (narrow, wide) = policy.crop_scale, policy.crop_ratio
    u, v = tries.chunk(2, dim=1)
    area = height * width * (low + u * (high - low))
    ratio = _in_place(math.log(narrow) + v * (math.log(wide) - math.log(narrow)), Tensor.exp_)
    roots = (_in_place(x, Tensor.sqrt_) for x in (area * ratio, area / ratio))
    w, h = (_in_place(x, Tensor.round_, 2047) for x in roots)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    top, left = (place[:, 0] * (height - h + 1)).floor(), (place[:, 1] * (width - w + 1)).floor()

    h_most = min(height, max(1, round(width / narrow)))
    w_most = min(width, max(1, round(height * wide)))
    centred = ((height - h_most) // 2, (width - w_most) // 2, h_most, w_most)
    drawn, none = zip((top, left, h, w), centred, strict=True), ~fits.any(1)
    return torch.stack([box.masked_fill(none, side) for box, side in drawn], dim=1).long()


def _factor_ranges(policy: AugmentPolicy) -> list[tuple[float, float]]:
    strengths = (policy.brightness, policy.contrast, policy.saturation)
    return [*((max(0.0, 1 - s), 1 + s) for s in strengths), (-policy.hue, policy.hue)]


def _draw_filters(draw: Callable[[int], Tensor], policy: AugmentPolicy, side: int) -> dict[str, Tensor]:
    """Blur weights and solarise thresholds for views whose shorter side is `side`."""
    if policy.blur == policy.solarize == 0:
        neutral = draw(0)
        return {
            "blur": neutral.new_ones(len(neutral), 1, dtype=torch.float32),
            "solarize": neutral.new_full((len(neutral),), math.inf, dtype=torch.float32),
        }
    blurred, spread, solarized = draw(3).unbind(1)
    # A reflected border needs a side longer than the radius.
    radius = min(max(1, side // 20), side - 1) if policy.blur else 0
    low, high = policy.blur_sigma
    sigma = (low + spread * (high - low))[:, None]
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    gaussian = _in_place(-0.5 * (offset / sigma) ** 2, Tensor.exp_)
    weights = torch.where((blurred < policy.blur)[:, None], gaussian / gaussian.sum(1, keepdim=True), offset == 0)
    threshold = torch.where(solarized < policy.solarize, policy.solarize_threshold, math.inf)
    return {"blur": weights.float(), "solarize": threshold.float()}


def _in_place(x: Tensor, operation: Callable[[Tensor], Tensor], most: int = 99) -> Tensor:
    """Overwrite [N, K] by an operation, on a CPU at most so many numbers at a time: then this thread does it alone.

    MKL shares exponentials and roots of 100 numbers or more between all threads, PyTorch roundings of 2048. To wait for
    them took 3 ms on a machine of 16 cores, a thousand times as long as to compute.
    """
    alone = x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() < 2**14
    for rows in x.split(max(1, most // x.shape[1])) if alone else (x,):
        operation(rows)
    return x


def as_size(argument: str, value: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, int]:
    """(height, width) from a side length or a pair; ValueError names `argument`."""
    try:
        pair = (value, value) if isinstance(value, int) or not _has_entries(value) else tuple(value)
        height, width = (as_count(argument, side, lowest=1) for side in pair)
    except (TypeError, ValueError):
        message = f"{argument}: expected a positive integer or two (height, width), got {value!r}"
        raise ValueError(message) from None
    return height, width


def _has_entries(value: object) -> bool:
    """Whether it is a sequence or an array, but not one number in an array."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def as_statistics(
    mean: Iterable[float] | None, std: Iterable[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`mean` and `std`, sequences, arrays or tensors, as three floats each; ValueError unless they are usable."""
    if mean is None or std is None:
        raise ValueError("mean and std: expected both or neither")
    of_both = []
    for name, value, lowest in (("mean", mean, -_LARGEST), ("std", std, _SMALLEST)):
        numbers = value.tolist() if hasattr(value, "tolist") else value
        numbers = tuple(numbers) if isinstance(numbers, Sequence) else ()
        # Asking for an abstract class takes ten times as long.
        if len(numbers) != 3 or not all(isinstance(x, (float, Real)) and lowest <= x <= _LARGEST for x in numbers):
            raise ValueError(f"{name}: expected three numbers from {lowest:g} to {_LARGEST:g}, got {value!r}")
        of_both.append(tuple(float(x) for x in numbers))
    return of_both[0], of_both[1]


def _expect_range(argument: str, value: tuple[float, float], highest: float = _LARGEST) -> None:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if not all(isinstance(x, Real) for x in pair) or len(pair) != 2 or not _SMALLEST <= pair[0] <= pair[1] <= highest:
        raise ValueError(f"{argument}: expected {_SMALLEST:g} <= low <= high <= {highest:g}, got {value!r}")
