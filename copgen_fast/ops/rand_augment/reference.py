"""RandAugment in PyTorch operators, without a loop over samples: Pillow's 8-bit operations, and their gradients.

Values are whole levels 0..255 after every operation. Rounding to a level is left out of the gradient, which is that
of the real-valued operation: -1 for Invert, the factor for Brightness, the interpolation weights for a rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.derivatives import transformed
from copgen_fast.ops.rand_augment.params import AFFINE, FILL, OPERATIONS, RandAugmentParams, matrices

_LUMINANCE = (19595, 38470, 7471)  # ITU-R 601 in 65536ths
_FIXED_POINT = 2.0**40


def rand_augment(images: Tensor, params: RandAugmentParams, straight_through: bool) -> Tensor:
    """[N, 3, h, w] of the images' dtype; see `copgen_fast.ops.rand_augment.functional`."""
    with torch.autocast(images.device.type, enabled=False):
        scaled = images * 255
        levels = _as_if(scaled.detach().nan_to_num().clamp(0, 255).round(), scaled)
        affine = matrices(params, *images.shape[2:])
        for step in range(params.operation.shape[1]):
            row = (params.operation[:, step], params.argument[:, step], params.cubic[:, step], affine[:, step])
            levels = _apply(levels, *row, straight_through)
        unfit = images.detach().isnan().flatten(1).any(1)
        views = torch.where(_per_image(unfit), torch.nan, levels / 255)
        return torch.where(_per_image((params.operation >= 0).any(1)), views.to(images.dtype), images)


def _apply(
    levels: Tensor, operation: Tensor, argument: Tensor, cubic: Tensor, matrix: Tensor, straight_through: bool
) -> Tensor:
    """One operation of each view."""
    affine = _is_any(operation, AFFINE)
    color, sharpness = _is(operation, "Color"), _is(operation, "Sharpness")
    tables = (operation >= 0) & ~(affine | color | sharpness)
    by = {"straight_through": straight_through}
    steps = (
        (tables, partial(_look_up, **by), (operation, argument)),
        (color, partial(_color, **by), (argument,)),
        (sharpness, partial(_sharpness, **by), (argument,)),
        (affine & ~cubic, partial(_warp, taps=2, **by), (matrix,)),
        (affine & cubic, partial(_warp, taps=4, **by), (matrix,)),
    )
    # Each view is in one of the steps.
    found = levels
    for turn, change, rows in steps:
        found = _where(turn, change, levels, found, rows)
    return found


def _where(
    turn: Tensor, change: Callable[..., Tensor], levels: Tensor, found: Tensor, rows: tuple[Tensor, ...]
) -> Tensor:
    """change(levels, *rows) for the views in `turn`, `found` for the others."""
    # Elsewhere, choosing rows would wait for the device, and break a compiled graph.
    if levels.device.type == "cpu" and not torch.compiler.is_compiling():
        chosen = turn.nonzero()[:, 0]
        if len(chosen) == 0:
            return found
        return found.index_copy(0, chosen, change(levels[chosen], *(row[chosen] for row in rows)))
    return torch.where(_per_image(turn), change(levels, *rows), found)


def _look_up(levels: Tensor, operation: Tensor, argument: Tensor, straight_through: bool) -> Tensor:
    """Operations that are a table of 256 levels for each channel of a view."""
    index = levels.detach().long().flatten(2)
    gray = _luminance(levels)
    value, slope, of_mean = _tables(index, _whole_luminance(levels), operation, argument, straight_through)
    found = value.gather(2, index).to(levels.dtype).view_as(levels)
    if not _differentiated(levels):
        return found
    slope, of_mean = (table.gather(2, index).to(levels.dtype).view_as(levels) for table in (slope, of_mean))
    mean = gray.mean((1, 2, 3), keepdim=True)
    return found + slope * (levels - levels.detach()) + of_mean * (mean - mean.detach())


def _tables(
    index: Tensor, gray: Tensor, operation: Tensor, argument: Tensor, straight_through: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables [N, 3, 256] of levels [N, 3, h w], whose luminance is `gray` [N, 1, h, w].

    They hold the new level, its derivative with respect to the old one, and that with respect to the mean luminance.
    """
    level = torch.arange(256, device=index.device)
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int64, device=index.device)
    counts.scatter_add_(2, index, index.new_ones(()).expand_as(index))
    lowest = (counts > 0).int().argmax(2, keepdim=True)
    highest = 255 - (counts.flip(2) > 0).int().argmax(2, keepdim=True)
    number = argument[:, None, None]
    one = torch.ones_like(counts, dtype=torch.float64)

    # ImageOps.autocontrast: int(level * scale + offset) in double precision.
    scale = torch.where(highest > lowest, 255 * one / (highest - lowest).clamp(min=1), one)
    stretched = torch.where(highest > lowest, (level * scale - lowest * scale).trunc(), level.double())
    # ImageOps.equalize
    step = (counts.sum(2, keepdim=True) - counts.gather(2, highest)) // 255
    even = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    dropped = (8 - number.long()).clamp(0, 8)
    # ImageEnhance: degenerate + factor * (level - degenerate) in single precision, towards zero.
    mean = (gray.double().mean((1, 2, 3))[:, None, None] + 0.5).floor().float()
    mean = torch.where(_is(operation, "Contrast")[:, None, None], mean, 0)
    blended = mean + number * (level - mean)
    passes = (((blended > 0) & (blended < 255)) | straight_through).double()
    factor = number.double() * passes
    found = {
        "AutoContrast": (stretched, scale),
        "Equalize": (torch.where(step > 0, even, level), one),
        "Invert": (255 - level, -one),
        "Posterize": ((level >> dropped) << dropped, one),
        "Solarize": (torch.where(level < number, level, 255 - level), torch.where(level < number, one, -one)),
        "SolarizeAdd": (torch.where(level < 128, level + number, level), one),
        "Contrast": (blended, factor),
        "Brightness": (blended, factor),
    }
    value, slope = one, one
    for name, (new, derivative) in found.items():
        here = _is(operation, name)[:, None, None]
        value, slope = torch.where(here, new.double(), value), torch.where(here, derivative, slope)
    of_mean = torch.where(_is(operation, "Contrast")[:, None, None], passes - factor, 0)
    return value.clamp(0, 255).trunc(), slope, of_mean.expand_as(slope)


def _color(levels: Tensor, factor: Tensor, straight_through: bool) -> Tensor:
    gray = _as_if(_whole_luminance(levels), _luminance(levels))
    return _blend(levels, gray, factor, straight_through)


def _sharpness(levels: Tensor, factor: Tensor, straight_through: bool) -> Tensor:
    """Away from Pillow's SMOOTH, a mean over 3 x 3 pixels, the middle one five times; the border stays."""
    height, width = levels.shape[2:]
    if min(height, width) < 3:
        return levels
    middle = levels[:, :, 1:-1, 1:-1]
    offsets = [(i, j) for i in range(3) for j in range(3)]
    total = 4 * middle + sum(levels[:, :, i : height - 2 + i, j : width - 2 + j] for i, j in offsets)
    smooth = _as_if(((total.detach() + 6) / 13).floor(), total / 13)
    return _blend(levels, levels + F.pad(smooth - middle, (1, 1, 1, 1)), factor, straight_through)


def _blend(levels: Tensor, degenerate: Tensor, factor: Tensor, straight_through: bool) -> Tensor:
    """degenerate + factor * (levels - degenerate), clipped, towards zero; Pillow's single precision for any dtype."""
    factor, difference = _per_image(factor), levels - degenerate
    value = degenerate.detach().float() + factor * difference.detach().float()
    if not _differentiated(levels):
        return _quantize(value, straight_through).to(levels.dtype)
    return _as_if(
        _quantize(value, straight_through).to(levels.dtype),
        _passing(degenerate + factor.to(levels.dtype) * difference, straight_through),
    )


def _warp(levels: Tensor, matrix: Tensor, taps: int, straight_through: bool) -> Tensor:
    """Sample every view at its matrix's places (see `matrices`); linear for 2 taps, cubic (a = -1) for 4."""
    height, width = levels.shape[2:]
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrix.unbind(1))
    y = torch.arange(height, device=levels.device, dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(width, device=levels.device, dtype=torch.float64) + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    (left, dx), (top, dy) = ((place.floor(), (place - place.floor()).to(levels.dtype)) for place in (x - 0.5, y - 0.5))
    offsets = torch.arange(taps, device=levels.device) - (taps // 2 - 1)
    columns = (left.long()[:, :, :, None] + offsets).clamp(0, width - 1)
    gather = _gather if transformed(levels) else _Gather.apply
    rows = []
    for offset in range(1 - taps // 2, 1 + taps // 2):
        places = columns + (top.long() + offset).clamp(0, height - 1)[:, :, :, None] * width
        near = gather(levels, places.flatten(1)).view(*levels.shape, taps)
        rows.append(_interpolate(near.unbind(4), dx[:, None]))
    sampled = _quantize(_interpolate(rows, dy[:, None]), straight_through)
    return torch.stack([torch.where(inside, sampled[:, i], FILL[i]) for i in range(3)], dim=1)


def _interpolate(values: list[Tensor] | tuple[Tensor, ...], d: Tensor) -> Tensor:
    """Pillow's formulas: constant where all values are the same, without rounding."""
    if len(values) == 2:
        return values[0] + (values[1] - values[0]) * d
    before, here, after, beyond = values
    second, third = 2 * (before - here) + after - beyond, here - before - after + beyond
    return here + d * (after - before + d * (second + d * third))


def _gather(images: Tensor, places: Tensor) -> Tensor:
    """Pixels [N, 3, P] of images [N, 3, h, w] at places [N, P]."""
    return images.flatten(2).gather(2, places[:, None].expand(-1, 3, -1))


class _Gather(torch.autograd.Function):
    """`_gather` whose gradient is the same bits on a GPU too."""

    forward = staticmethod(_gather)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN001
        ctx.save_for_backward(inputs[1])
        ctx.shape = tuple(inputs[0].shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return _Scatter.apply(grad, *ctx.saved_tensors, ctx.shape), None


class _Scatter(torch.autograd.Function):
    """The adjoint of `_gather`, in fixed point: floating-point sums would depend on the order of a GPU's threads."""

    @staticmethod
    def forward(values: Tensor, places: Tensor, shape: tuple[int, int, int]) -> Tensor:
        largest = values.abs().amax((1, 2), keepdim=True).double()
        unit = torch.where(largest > 0, largest, 1) / _FIXED_POINT
        whole = (values / unit).round().nan_to_num().long()
        total = whole.new_zeros(len(values), 3, shape[1] * shape[2])
        total.scatter_add_(2, places[:, None].expand(-1, 3, -1), whole)
        return (total * unit).to(values.dtype).view(-1, *shape)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _Gather.apply(grad, *ctx.saved_tensors), None, None


def _quantize(smooth: Tensor, straight_through: bool) -> Tensor:
    """Clip to 0..255 and round towards zero; the clip passes no gradient, or all of it."""
    return _as_if(smooth.detach().clamp(0, 255).trunc(), _passing(smooth, straight_through))


def _passing(smooth: Tensor, straight_through: bool) -> Tensor:
    """`smooth` with the gradient that its clip to 0..255 passes."""
    return smooth if straight_through else torch.where((smooth > 0) & (smooth < 255), smooth, smooth.detach())


def _as_if(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, with the gradient of `smooth`."""
    return value.detach() + (smooth - smooth.detach()) if _differentiated(smooth) else value


def _differentiated(x: Tensor) -> bool:
    return x.requires_grad or transformed(x)


def _luminance(levels: Tensor) -> Tensor:
    """[N, 1, h, w]"""
    r, g, b = (weight / 65536 * levels[:, i : i + 1] for i, weight in enumerate(_LUMINANCE))
    return r + g + b


def _whole_luminance(levels: Tensor) -> Tensor:
    """Pillow's conversion to "L" [N, 1, h, w]: rounded sums in fixed point."""
    r, g, b = (weight * levels[:, i : i + 1].detach().int() for i, weight in enumerate(_LUMINANCE))
    return ((r + g + b + 0x8000) >> 16).to(levels.dtype)


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _is_any(operation: Tensor, names: tuple[str, ...]) -> Tensor:
    return sum(_is(operation, name) for name in names) > 0


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
