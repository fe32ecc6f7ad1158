"""Reference implementation of the augmentation in PyTorch operators, without a loop over samples.

Values and gradients are those of torchvision's float-tensor path, sample by sample; faster backends are tested
against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.augment.params import AugmentParams
from copgen_fast.ops.rand_augment.functional import RandAugmentParams, rand_augment

_CONTRAST, _SATURATION, _HUE = 1, 2, 3
# Values nearer than some roundings to a threshold are at it, as those of constant images may be: rounding must not
# decide. At a solarise's threshold a value is inverted; at the bounds of a clamp, and of the hue's ramps, which are
# quotients by the spread in sixths of a turn, it takes no gradient; channels as near to each other are equal.
_ROUNDINGS, _OF_SIXTHS = 8, 64


def augment(
    images: Tensor,
    params: AugmentParams,
    out_size: tuple[int, int],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    straight_through: bool,
) -> Tensor:
    """Augmented [V N, 3, h, w] in float32 (float64 for float64 images); see `copgen_fast.ops.augment.functional`."""
    # Autocast would run the resize in half precision.
    with torch.autocast(images.device.type, enabled=False):
        x = _to_unit_range(images)
        if len(params) > len(images):
            x = x.repeat(len(params) // len(images), 1, 1, 1)
        x = crop_resize_flip(x, params.crop, params.flip, out_size)
        x = color_jitter(x, params.order, params.factors, params.jitter, straight_through)
        if params.rand_augment is None:
            x = to_gray(x, params.gray)
        x = separable_filter(x, params.blur)
        if params.rand_augment is not None:
            x = randomize(x, params.rand_augment, params.gray, straight_through, "reference")
        return finish(x, params.solarize, mean, std)


def to_gray(x: Tensor, gray: Tensor) -> Tensor:
    """Three channels of the luminance of [N, 3, h, w] where `gray` [N]."""
    return torch.where(_per_image(gray), luminance(x)[:, None], x)


def randomize(
    x: Tensor, rand: RandAugmentParams, gray: Tensor, straight_through: bool, backend: str | None = None
) -> Tensor:
    """RandAugment of [N, 3, h, w], and then the gray."""
    clamp = "straight_through" if straight_through else "exact"
    return to_gray(rand_augment(x, rand, clamp=clamp, backend=backend), gray)


def finish(x: Tensor, solarize: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """Invert the channels of [N, 3, h, w] that reach `solarize` [N], then normalise."""
    x = torch.where(x >= _per_image(solarize.to(x.dtype) - _tie(x)), 1 - x, x)
    return x if mean is None else _normalize(x, mean, std)


def separable_filter(x: Tensor, weights: Tensor) -> Tensor:
    """Filter [N, 3, h, w] along both axes by each sample's `weights` [N, 2R + 1], with reflected borders."""
    radius = weights.shape[1] // 2
    if radius == 0:
        return x
    height, width = x.shape[2:]
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    taps = [_per_image(tap) for tap in weights.to(x.dtype).unbind(1)]
    rows = sum(tap * padded[:, :, :, k : k + width] for k, tap in enumerate(taps))
    return sum(tap * rows[:, :, k : k + height] for k, tap in enumerate(taps))


def crop_resize_flip(images: Tensor, crop: Tensor, flip: Tensor, out_size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of each image's crop, mirrored where `flip`: floating [N, 3, h, w].

    A resize is linear and separable, out = R x C^T with one small matrix per axis and sample: its
    backward is the transposes, exact and deterministic.
    """
    n, channels, height, width = images.shape
    top, left, crop_height, crop_width = crop.unbind(1)
    rows = _resize_matrix(top, crop_height, height, out_size[0], torch.zeros_like(flip), images.dtype)
    columns = _resize_matrix(left, crop_width, width, out_size[1], flip, images.dtype)
    x = images.reshape(n, channels * height, width) @ columns.mT
    return rows[:, None] @ x.view(n, channels, height, out_size[1])


def _resize_matrix(start: Tensor, length: Tensor, size: int, out: int, mirrored: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [N, out, size] of the triangle filter from pixels start .. start + length - 1 to `out` pixels.

    With s = length / out, output i is centred on start + (i + 1/2) s, and pixel j weighs
    1 - |j + 1/2 - centre| / max(s, 1). Multiplied by 2 out, the distance is a difference of integers,
    exact in float32 up to sizes of 2896.
    """
    device = start.device
    start, length, mirrored = start[:, None], length[:, None], mirrored[:, None]
    i = torch.arange(out, device=device)
    i = torch.where(mirrored, out - 1 - i, i)
    j = torch.arange(size, device=device) - start
    inside = (j >= 0) & (j < length)
    centre = ((2 * i + 1) * length).to(dtype)
    # Pixels outside the crop are infinitely far from every centre.
    pixel = ((2 * j + 1) * out).to(dtype).masked_fill(~inside, torch.inf)
    distance = (centre[:, :, None] - pixel[:, None, :]).abs() / (2 * length.clamp(min=out))[:, :, None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)


def color_jitter(x: Tensor, order: Tensor, factors: Tensor, jitter: Tensor, straight_through: bool) -> Tensor:
    """Brightness, contrast, saturation and hue of [N, 3, h, w] in [0, 1], in each sample's order.

    Three of the four are blends of one form, so every order is: the blends before the hue, the hue, the
    blends after it. Samples skip the steps of other orders by masks, without a branch.
    """
    # Reading a tensor would make a GPU wait, and break a compiled graph.
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not jitter.any():
        return x
    hue_at = (order == _HUE).int().argmax(1)
    factor_at = factors.to(x.dtype).gather(1, order)
    for position in (0, 1, 2):
        turn = jitter & (position < hue_at)
        x = _blend(x, order[:, position], factor_at[:, position], turn, straight_through)
    x = _shift_hue(x, factors[:, _HUE].to(x.dtype), jitter)
    for position in (1, 2, 3):
        turn = jitter & (position > hue_at)
        x = _blend(x, order[:, position], factor_at[:, position], turn, straight_through)
    return x


def _blend(x: Tensor, op: Tensor, factor: Tensor, turn: Tensor, straight_through: bool) -> Tensor:
    """clamp(f x + (1 - f) pivot) for the samples in `turn`; x itself for the others.

    The pivot is black for brightness, the image's mean luminance for contrast, the pixel's for saturation.
    """
    gray = luminance(x)
    rest = 1 - factor
    to_mean = (rest * (op == _CONTRAST))[:, None, None]
    to_gray = (rest * (op == _SATURATION))[:, None, None]
    pivot = to_mean * gray.mean((1, 2), keepdim=True) + to_gray * gray
    blended = torch.addcmul(pivot[:, None], x, _per_image(factor))
    bounded = _clamp(blended, _tie(x))
    if straight_through:
        bounded = bounded.detach() + (blended - blended.detach())
    return torch.where(_per_image(turn & (factor != 1)), bounded, x)


def _tie(x: Tensor, roundings: int = _ROUNDINGS) -> float:
    return roundings * torch.finfo(x.dtype).eps


def _clamp(x: Tensor, tie: float | Tensor) -> Tensor:
    """x bounded by 0 and 1, without gradient there; PyTorch's versions differ in the gradient at the bounds."""
    bounded = x.detach().clamp(0, 1)
    return torch.where((x > tie) & (x < 1 - tie), x, bounded)


def _shift_hue(x: Tensor, shift: Tensor, jitter: Tensor) -> Tensor:
    """Shift HSV's hue of [N, 3, h, w] by `shift` [N] turns where `jitter`, wrapping around.

    With M, m the largest and smallest channel and hue H in sixths of a turn, channel c is
    M - (M - m) clamp(2 - |(H + n_c) mod 6 - 2|, 0, 1), n = 5, 3, 1 for R, G, B. It stays between m and M,
    so it needs no clamp. Where channels tie, the first takes the gradient.
    """
    r, g, b = x.unbind(1)
    # Multiplying by masks beats torch.where on a CPU, where random conditions cost mispredicted branches.
    is_r, is_g, is_b = _first_of(x.detach(), torch.maximum)
    low_r, low_g, low_b = _first_of(x.detach(), torch.minimum)
    high = is_r * r + is_g * g + is_b * b
    spread = high - (low_r * r + low_g * g + low_b * b)
    sixths = is_r * (g - b) + is_g * (b - r) + is_b * (r - g)
    # A gray pixel has hue 0.
    gray = (spread.detach() <= _tie(x)).to(x.dtype)
    turns = (sixths * (1 - gray) / (spread + gray) + (2 * is_g + 4 * is_b)) / 6
    turns = turns + shift.remainder(1)[:, None, None]
    ramps = (2 - 6 * ((turns + n / 6).frac() - 1 / 3).abs() for n in (5, 3, 1))
    tie = _tie(x, _OF_SIXTHS) + _tie(x) / (spread.detach() + gray)
    shares = (_clamp(ramp, tie) for ramp in ramps)
    shifted = torch.stack([high - spread * share for share in shares], dim=1)
    return torch.where(_per_image(jitter & (shift != 0)), shifted, x)


def _first_of(x: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot masks [N, h, w] over the channels of `x`: the first that is the largest, or the smallest."""
    r, g, b = x.unbind(1)
    value = extreme(extreme(r, g), b)
    is_r = ((r - value).abs() <= _tie(x)).to(x.dtype)
    is_g = ((g - value).abs() <= _tie(x)).to(x.dtype) * (1 - is_r)
    return is_r, is_g, 1 - is_r - is_g


def luminance(x: Tensor) -> Tensor:
    """Luminance [N, h, w] of [N, 3, h, w] (ITU-R 601 weights, torchvision's digits)."""
    r, g, b = x.unbind(1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def _normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    # Channel by channel with Python numbers: a tensor of means would be copied to the device, and waited for.
    return torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), mean, std, strict=True)], dim=1)


def _to_unit_range(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images if images.dtype == torch.float64 else images.float()


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
