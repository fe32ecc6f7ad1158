"""3 x 3 convolution by Winograd's F(4 x 4, 3 x 3), in strips of rows whose intermediate values stay in a cache.

The 4 outputs of a tile along an axis are a polynomial product's coefficients, found from its values at six points: 6
products in place of 12, along both axes 36 in place of 144 (Lavin and Gray 2016). Rounding errors depend on the points.
With the usual 0, 1, -1, 2, -2 and infinity they are several times a direct convolution's, with 0, a, -a, 1/a, -1/a and
infinity, a = sqrt(2), twice. These are closed under p -> 1/p, which reverses a polynomial: flipped taps have the same
values at other points, and the gradient takes the same weights.

Where the C++ extension is built, it computes all of it on CPUs (`ops.tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from copgen_fast.ops import tiles
from copgen_fast.ops.strips import Finish, divisor, strips

SIDE = 4
"""Outputs of a tile along an axis."""

# From where on fewer products pay for the sums around them, by the C++ extension.
FEWEST = 32
"""Channels in and out."""
LEAST_FILL = 0.5
"""Of the tiles by an image (`fill`)."""

TILES = 256  # of a strip: products of matrices that large, and few values
_A, _B = math.sqrt(2), math.sqrt(0.5)
_ORDER = (0, 1, 2, 3, 4, 5)
_REVERSED = (5, 3, 4, 1, 2, 0)  # the points' inverses


def prepare(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] to [36, in, out]: the taps' values at the points 0, a, -a, 1/a, -1/a and infinity, scaled."""
    rows = [[3, 0, 0], [_B, 1, _A], [-_B, 1, -_A], [_A, 1, _B], [-_A, 1, -_B], [0, 0, 3]]
    values = torch.tensor(rows, dtype=torch.float64, device=weight.device) / 3
    found = torch.einsum("ak,bl,oikl->abio", values, values, weight.double())
    return found.flatten(0, 1).to(weight.dtype).contiguous()


def fill(height: int, width: int) -> float:
    """Share of the tiles' outputs that lie within an image of this size; the others are computed and dropped."""
    return height * width / (tiles_of(height, width) * SIDE**2)


def tiles_of(height: int, width: int) -> int:
    """Number of tiles of an image of this size."""
    return _tiles(height) * _tiles(width)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Images [N, H, W, C] by a prepared weight; H and W are multiples of 4, or any where `tiles.fits`.

    Args:
        weight: as `prepare` gives it, or that in `tiles.pairs`.
        added: what is added to the outputs, of their shape.
        relu: whether a ReLU follows.
        out: where the outputs are written, contiguous; None: a new tensor.
    """
    out = _outputs_like(x, weight.shape[2]) if out is None else out
    if tiles.fits(x, weight):
        added = None if added is None else added.contiguous()
        return tiles.convolve(x, weight, "winograd", out, bias=bias, added=added, relu=relu)
    if out.numel():
        _by_torch(x, weight, None, None, _ORDER, out)
    for term in (bias, added):
        out = out if term is None else out.add_(term)
    return out.relu_() if relu else out


def styled(x: Tensor, weight: Tensor, styles: Tensor, finish: Finish) -> Tensor:
    """`convolve` of images times styles [N, C]; `finish` follows while values are in the cache."""
    out = _outputs_like(x, weight.shape[2])
    if not out.numel():
        return out
    if not tiles.fits(x, weight):
        _by_torch(x, weight, styles, finish, _ORDER, out)
        return out
    n, height, width = x.shape[:3]
    wide = _tiles(width)
    rows = min(_tiles(height), max(1, TILES // wide))
    images = max(1, TILES // (rows * wide)) if rows == _tiles(height) else 1
    for image in range(0, n, images):
        chosen = slice(image, image + images)
        for first in range(0, height, SIDE * rows):
            lines = slice(first, first + SIDE * rows)
            into = out[chosen, lines]
            tiles.convolve(x[chosen], weight, "winograd", into, first=first, styles=styles[chosen])
            finish(into, into, chosen, lines)
    return out


def adjoint(gradient: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of x: the convolution by flipped taps, written as by `convolve`."""
    out = _outputs_like(gradient, weight.shape[1]) if out is None else out
    if tiles.fits_transposed(gradient, weight):
        return tiles.convolve_transposed(gradient, weight, "winograd adjoint", out)
    if out.numel():
        _by_torch(gradient, weight.transpose(1, 2), None, None, _REVERSED, out)
    return out


def _outputs_like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(*x.shape[:3], channels)


def _tiles(side: int) -> int:
    return -(-side // SIDE)


def _by_torch(
    x: Tensor, weight: Tensor, styles: Tensor | None, finish: Finish | None, order: Sequence[int], out: Tensor
) -> None:
    """`order` says which of the weight's six numbers along an axis are the values at each point."""
    (n, height, width, channels), outputs = x.shape, weight.shape[2]
    high, wide = height // SIDE, width // SIDE
    rows = divisor(high, TILES // wide)
    images = divisor(n, TILES // (rows * wide)) if rows == high else 1
    tiles, size = (images, rows, wide), SIDE * rows
    by_row, spare_row = (x.new_empty(k, images, rows, width + 2, channels) for k in (6, 2))
    by_both, spare_both = (x.new_empty(6, k, *tiles, channels) for k in (6, 2))
    products, columns, spare_columns = (x.new_empty(6, k, *tiles, outputs) for k in (6, 4, 2))
    spare_out = x.new_empty(2, 4, *tiles, outputs)
    for strip, chosen, lines in strips(x, images, size, 1, styles):
        _values([strip[:, i : i + size - 3 : SIDE] for i in range(6)], by_row, spare_row, order)
        along = [by_row[:, :, :, i : i + width - 3 : SIDE] for i in range(6)]
        _values(along, by_both.unbind(1), spare_both.unbind(1), order)
        torch.bmm(by_both.view(36, -1, channels), weight, out=products.view(36, -1, outputs))
        _outputs(products.unbind(1), columns.unbind(1), spare_columns.unbind(1), order)
        into = out[chosen, lines]
        by_place = into.view(images, rows, SIDE, wide, SIDE, outputs).permute(2, 4, 0, 1, 3, 5)
        _outputs(columns, by_place, spare_out, order)
        if finish is not None:
            finish(into, into, chosen, lines)


def _values(x: Sequence[Tensor], out: Sequence[Tensor], spare: Sequence[Tensor], order: Sequence[int]) -> None:
    """Six neighbours of a tile to what multiplies the weight's values."""
    zero, plus, minus, inverse_plus, inverse_minus, infinity = (out[i] for i in order)
    q, r = spare
    torch.add(x[0], x[4], out=zero).sub_(x[2], alpha=2.5)
    torch.add(x[1], x[5], out=infinity).sub_(x[3], alpha=2.5)
    torch.sub(x[3], x[1], alpha=0.5, out=q)
    torch.sub(x[4], x[2], alpha=0.5, out=r)
    torch.add(q, r, alpha=_B, out=plus)
    torch.sub(q, r, alpha=_B, out=minus)
    torch.sub(x[3], x[1], alpha=2, out=q)
    torch.sub(x[4], x[2], alpha=2, out=r)
    torch.add(q, r, alpha=_A, out=inverse_plus)
    torch.sub(q, r, alpha=_A, out=inverse_minus)


def _outputs(products: Sequence[Tensor], out: Sequence[Tensor], spare: Sequence[Tensor], order: Sequence[int]) -> None:
    """Six products to the four outputs."""
    zero, plus, minus, inverse_plus, inverse_minus, infinity = (products[i] for i in order)
    of, of_inverse = spare
    torch.add(plus, minus, out=of)
    torch.add(inverse_plus, inverse_minus, out=of_inverse)
    torch.add(zero, of, out=out[0]).sub_(of_inverse)
    torch.sub(of, of_inverse, alpha=0.25, out=out[2]).mul_(2)
    torch.sub(plus, minus, out=of)
    torch.sub(inverse_plus, inverse_minus, out=of_inverse)
    torch.sub(of, of_inverse, alpha=0.5, out=out[1]).mul_(_A)
    torch.sub(of, of_inverse, alpha=0.125, out=of)
    torch.add(infinity, of, alpha=2 * _A, out=out[3])
