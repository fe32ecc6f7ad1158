"""3 x 3 convolutions, plain or after nearest upsampling by 2, in fewer multiplications.

A method prepares the weight [out, in, 3, 3] once and computes the same sums from it; all pad with zeros.
Multiplications per output pixel and pair of channels, of which a direct convolution takes 9:

- transposed: 4. Two of three taps along an axis fall on one pixel of the small image. What is left is a transposed
  4 x 4 convolution with stride 2.
- differences: 25 / 16. Along an axis, with the taps (u, v, w) and their sum s, the pixels b and c between a and d
  become the outputs u (a - c) + m - q, m + p, m + q and w (d - b) + m - p, where m = s (b + c) / 2,
  p = (w - u - v) (c - b) / 2 and q = (v + w - u) (c - b) / 2: five products for four outputs, of even sides. This is
  F(4, 3) of the upsampled image with -1 among its points, where all values vanish.
- winograd: 4, by F(2 x 2, 3 x 3) (Lavin and Gray 2016), of an image that is not upsampled.
- large tiles: 9 / 4, by F(4 x 4, 3 x 3), of an image that is not upsampled, with sides that are multiples of 4.

The last three are matrix products over channels with sums and copies around them, which pay where channels are many;
in tiles of the C++ extension (`ops.tiles`) from few channels on. Their gradients with respect to the image are written
out: as many products, and the same few copies. Weights are constants and get none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from copgen_fast.ops import tiles, winograd


@dataclass(frozen=True)
class Method:
    """A way to compute a convolution: `run(x, prepare(weight), bias)`.

    `adjoint(gradient, prepare(weight))` is the gradient of x, for where autograd would keep x without need.
    """

    prepare: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    adjoint: Callable[[Tensor, Tensor], Tensor] | None = None

    def __reduce__(self) -> str:
        """Its name in this file, by which it is pickled: its functions can't be."""
        return next(name for name, value in globals().items() if value is self)


class ByConstant(torch.autograd.Function):
    """compute(x, weight, bias), linear in x, with gradient adjoint(gradient, weight), for which x is not kept.

    `compute` returns no view, so that its result may be overwritten.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, compute: Callable, adjoint: Callable) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(weight)
        ctx.adjoint = adjoint
        return compute(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        with torch.autocast(gradient.device.type, enabled=False):  # as forward, in the weight's precision
            return ctx.adjoint(gradient, *ctx.saved_tensors), None, None, None, None


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _upsampled_direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)


def _for_transposed(weight: Tensor) -> Tensor:
    """[in, out, 4, 4]: the sums of taps that fall on one pixel of the small image."""
    taps = weight.transpose(0, 1).flip(2, 3)
    return sum(F.pad(taps, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)


def _for_differences(weight: Tensor) -> Tensor:
    """Weight [25, in, out] for upsampling: taps u, s / 2, (w - u - v) / 2, (v + w - u) / 2, w by row and by column."""
    rows = [[1, 0, 0], [0.5, 0.5, 0.5], [-0.5, -0.5, 0.5], [-0.5, 0.5, 0.5], [0, 0, 1]]
    of_taps = weight.new_tensor(rows)
    return torch.einsum("ak,bl,oikl->abio", of_taps, of_taps, weight).flatten(0, 1).contiguous()


def _differences(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def values(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
        difference = c - b
        return [a - c, b + c, difference, difference, d - b]

    def outputs(m: Sequence[Tensor]) -> list[Tensor]:
        return [m[0] + m[1] - m[3], m[1] + m[2], m[1] + m[3], m[4] + m[1] - m[2]]

    out = _in_parts(x, weight, 2, values, outputs)
    return out if bias is None else out.add_(bias[:, None, None])


def _differences_adjoint(gradient: Tensor, weight: Tensor) -> Tensor:
    def values(*x: Tensor) -> list[Tensor]:
        return [x[5] - x[1], x[1] + x[2] + x[3] + x[4], x[2] - x[4], x[3] - x[1], x[0] - x[4]]

    def outputs(m: Sequence[Tensor]) -> list[Tensor]:
        return [m[1] - m[2] - m[3] + m[4], m[0] + m[1] + m[2] + m[3]]

    return _in_parts(gradient, weight.transpose(1, 2), 4, values, outputs)


def _in_parts(x: Tensor, weight: Tensor, side: int, values: Callable, outputs: Callable) -> Tensor:
    """Convolve tiles of `side` x `side` pixels: transform, batched matrix product with [25, C, O], transform back.

    Args:
        values: side + 2 tensors of neighbours along an axis to five.
        outputs: five products to the outputs along an axis.
    """
    (n, channels, height, width), count = x.shape, weight.shape[2]
    x = F.pad(_rows(x), (0, 0, 1, 1, 1, 1))
    by_row = torch.stack(values(*(x[:, i : i + height : side] for i in range(side + 2))))
    by_both = torch.stack(values(*(by_row[..., i : i + width : side, :] for i in range(side + 2))), 1)
    product = torch.bmm(by_both.view(25, -1, channels), weight).view(*by_both.shape[:-1], count)
    columns = torch.stack(outputs(product.unbind(1)), 4)
    rows = outputs(columns.unbind())
    high, wide, size = height // side, width // side, len(rows)
    out = _images(x, n, count, size * high, size * wide)
    torch.stack(rows, 2, out=_rows(out).view(n, high, size, wide, size, count))
    return out


def _tiled_differences(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not tiles.fits(x, weight):
        return _differences(x, weight, bias)
    n, _, height, width = x.shape
    out = _images(x, n, weight.shape[2], 2 * height, 2 * width)
    tiles.convolve(_rows(x), weight, "differences", _rows(out), bias=bias)
    return out


def _tiled_differences_adjoint(gradient: Tensor, weight: Tensor) -> Tensor:
    if not tiles.fits_transposed(gradient, weight):
        return _differences_adjoint(gradient, weight)
    n, _, height, width = gradient.shape
    out = _images(gradient, n, weight.shape[1], height // 2, width // 2)
    tiles.convolve_transposed(_rows(gradient), weight, "differences adjoint", _rows(out))
    return out


def _for_winograd(weight: Tensor) -> Tensor:
    """[16, in, out]."""
    of_taps = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.einsum("ak,bl,oikl->abio", of_taps, of_taps, weight).flatten(0, 1).contiguous()


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, order: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
    """For even H and W. `order` is the order of the weight's four numbers along an axis."""
    (n, channels, height, width), outputs = x.shape, weight.shape[2]
    x = F.pad(_rows(x), (0, 0, 1, 1, 1, 1))
    a, b, c, d = (x[:, i : i + height : 2] for i in range(4))
    tiles, rows = [], (a - c, b + c, c - b, b - d)
    for row in (rows[i] for i in order):
        e, f, g, h = (row[:, :, j : j + width : 2] for j in range(4))
        columns = (e - g, f + g, g - f, f - h)
        tiles += [columns[j] for j in order]
    product = torch.bmm(torch.stack(tiles).view(16, -1, channels), weight)
    m = product.view(4, 4, n, height // 2, width // 2, outputs)
    a, b, c, d = order
    columns = torch.stack([m[:, a] + m[:, b] + m[:, c], m[:, b] - m[:, c] - m[:, d]], 4)
    rows = [columns[a] + columns[b] + columns[c], columns[b] - columns[c] - columns[d]]
    out = _images(x, n, outputs, height, width)
    torch.stack(rows, 2, out=_rows(out).view(n, height // 2, 2, width // 2, 2, outputs))
    return out if bias is None else out.add_(bias[:, None, None])


def _winograd_adjoint(gradient: Tensor, weight: Tensor) -> Tensor:
    """The convolution by flipped taps, which exchange their first and last number."""
    return _winograd(gradient, weight.transpose(1, 2), None, (3, 1, 2, 0))


def _large_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _images(x, len(x), weight.shape[2], *x.shape[2:])
    winograd.convolve(_rows(x), weight, bias, out=_rows(out))
    return out


def _large_tiles_adjoint(gradient: Tensor, weight: Tensor) -> Tensor:
    out = _images(gradient, len(gradient), weight.shape[1], *gradient.shape[2:])
    winograd.adjoint(_rows(gradient), weight, out=_rows(out))
    return out


def _rows(x: Tensor) -> Tensor:
    """View images [N, C, H, W] as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def _images(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised channels_last images [N, C, H, W]; no view, as autograd copies gradients of overwritten views."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _within_range(adjoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An adjoint of which float16 keeps the range: gradients are as large as a scaled loss makes them.

    Sums of four neighbours, and products that only add up to the result, would exceed float16 before the result does.
    So the largest value is made 64 by a power of two, and the result scaled back; an infinity or a NaN stays none that
    is finite. The power fits float16 itself, to which a GPU rounds it before it multiplies.
    """

    def run(gradient: Tensor, weight: Tensor) -> Tensor:
        if gradient.dtype != torch.float16 or not gradient.numel():
            return adjoint(gradient, weight)
        largest = torch.linalg.vector_norm(gradient, torch.inf, dtype=torch.float32)
        scale = torch.exp2((64 / largest).log2().floor()).clamp_max(2**15)
        return adjoint(gradient * scale, weight) / scale

    return run


def _by_constant(compute: Callable[..., Tensor], adjoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Method.run` of methods by matrix products over channels, on images [N, C, H, W]."""
    within_range = _within_range(adjoint)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ByConstant.apply(x, weight, bias, compute, within_range)

    return run


def _in_both_layouts(weight: Tensor) -> Tensor:
    """A prepared weight [K, C, O], C even, to [2, K, C, O]: in `tiles.pairs`, and as it is, for gradients."""
    return torch.stack([tiles.pairs(weight).view_as(weight), weight])


def _of_bfloat16(
    prepare: Callable[[Tensor], Tensor], compute: Callable[..., Tensor], adjoint: Callable[..., Tensor]
) -> Method:
    """A method in tiles, whose prepared weight has both layouts of bfloat16."""

    def computed(x: Tensor, both: Tensor, bias: Tensor | None) -> Tensor:
        paired, plain = both
        paired = paired.view(len(plain), -1, plain.shape[2], 2)
        return compute(x, paired if tiles.fits(x, paired) else plain, bias)

    def of_plain(gradient: Tensor, both: Tensor) -> Tensor:
        return adjoint(gradient, both[1])

    def run(x: Tensor, both: Tensor, bias: Tensor | None) -> Tensor:
        return ByConstant.apply(x, both, bias, computed, of_plain)

    return Method(lambda weight: _in_both_layouts(prepare(weight)), run)


def in_bfloat16(method: Method, weight: Tensor) -> tuple[Method, Tensor]:
    """The method and prepared weight that compute the same in bfloat16: others where the extension has them."""
    if method not in _OF_BFLOAT16 or weight.shape[1] % 2 or not tiles.compiled(weight.new_empty(0).bfloat16()):
        return method, weight.bfloat16()
    return _OF_BFLOAT16[method], _in_both_layouts(weight).bfloat16()


def _for_full_transposed(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).contiguous()


def _full_transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride=2)


def _for_smoothing(taps: Tensor) -> Tensor:
    return taps.flip(2, 3).contiguous()


def _smoothed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=len(weight))


def _smoothed_adjoint(gradient: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(gradient, weight, padding=1, groups=len(weight))


def _merged(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=2)


def _same(weight: Tensor) -> Tensor:
    return weight


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias)


DIRECT = Method(_same, _direct, lambda gradient, weight: F.conv_transpose2d(gradient, weight, padding=1))
WINOGRAD = Method(_for_winograd, _by_constant(_winograd, _winograd_adjoint))
LARGE_TILES = Method(winograd.prepare, _by_constant(_large_tiles, _large_tiles_adjoint))
UPSAMPLED_DIRECT = Method(_same, _upsampled_direct)
TRANSPOSED = Method(
    _for_transposed, _transposed, lambda gradient, weight: F.conv2d(gradient, weight, stride=2, padding=1)
)
DIFFERENCES = Method(_for_differences, _by_constant(_differences, _differences_adjoint))
TILED_DIFFERENCES = Method(_for_differences, _by_constant(_tiled_differences, _tiled_differences_adjoint))
LARGE_TILES_BFLOAT16 = _of_bfloat16(winograd.prepare, _large_tiles, _large_tiles_adjoint)
TILED_DIFFERENCES_BFLOAT16 = _of_bfloat16(_for_differences, _tiled_differences, _tiled_differences_adjoint)
_OF_BFLOAT16 = {LARGE_TILES: LARGE_TILES_BFLOAT16, TILED_DIFFERENCES: TILED_DIFFERENCES_BFLOAT16}
POINTWISE = Method(_same, _pointwise, lambda gradient, weight: F.conv_transpose2d(gradient, weight))  # 1 x 1
# The two halves of a convolution of an image upsampled by a filter of 4 x 4 taps, which smooths what the first half
# leaves, 2H + 1 pixels wide; and both in one of 6 x 6 taps: one pass, of four times as many products over channels.
FULL_TRANSPOSED = Method(
    _for_full_transposed, _full_transposed, lambda gradient, weight: F.conv2d(gradient, weight, stride=2)
)
SMOOTHED = Method(_for_smoothing, _smoothed, _smoothed_adjoint)
MERGED = Method(_same, _merged, lambda gradient, weight: F.conv2d(gradient, weight, stride=2, padding=2))
