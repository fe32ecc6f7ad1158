"""The 3 x 3 convolution as PyTorch operators, for `torch.compile` and autograd.

A weight is prepared for the tiles (`ops.tiles`) at every call, for some of its channels at a time: what is prepared is
four times as large as the weight, and memory that is new in every step costs more than the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops import tiles
from copgen_fast.ops.backend import load
from copgen_fast.ops.conv3x3 import reference
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.library import operator, register_autograd

_PREPARED = 2**21  # numbers of a prepared weight at once: they stay in a shared cache
_TOGETHER = 32  # channels that the tiles compute at once


@operator("conv3x3")
def fused_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x [N, C, H, W] by a weight [O, C, 3, 3]; the result is stored channels last."""
    out = _images(x, weight.shape[0])
    if out.numel():
        rows, of_out = _rows(x), _rows(out)
        for some in _parts(weight.shape[0], weight.shape[1]):
            tiles.convolve(rows, tiles.prepare(weight[some]), "winograd", of_out[..., some])
    return out


register_fake(fused_conv3x3, lambda x, weight: _images(x, weight.shape[0]))


@operator("conv3x3_backward")
def fused_conv3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, each empty unless it is wanted, from that of the result."""
    grads = _allocate_grads(x, weight, with_x, with_weight)
    if not grad.numel():
        return tuple(empty_sum.zero_() for empty_sum in grads)
    channels, outputs = x.shape[1], grad.shape[1]
    gradient, turned = _rows(grad), weight.transpose(0, 1)
    if with_x:
        of_x = _rows(grads[0])
        for some in _parts(channels, outputs):
            tiles.convolve(gradient, tiles.prepare(turned[some]), "winograd adjoint", of_x[..., some])
    if with_weight:
        rows = _rows(x)
        for some in _parts(channels, outputs):
            load("cpp", "tiles").tiles_weight_gradient(rows[..., some], gradient, grads[1][:, some])
    return grads


register_fake(
    fused_conv3x3_backward,
    lambda grad, x, weight, with_x, with_weight: _allocate_grads(x, weight, with_x, with_weight),
)


def _allocate_grads(x: Tensor, weight: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        _images(x, x.shape[1]) if with_x else x.new_empty(0),
        torch.empty_like(weight) if with_weight else weight.new_empty(0),
    )


def _parts(channels: int, others: int) -> Iterator[slice]:
    """Slices of channels for which the prepared weight, with all of the `others`, is small."""
    count = -(-channels * 36 * others // _PREPARED)
    size = -(-channels // count // _TOGETHER) * _TOGETHER
    yield from (slice(first, min(first + size, channels)) for first in range(0, channels, size))


def _rows(x: Tensor) -> Tensor:
    """View images [N, C, H, W] as [N, H, W, C] with contiguous channels, copied where they are not channels_last."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _images(x: Tensor, channels: int) -> Tensor:
    """Uninitialised images [N, channels, H, W] like x, channels last."""
    n, _, height, width = x.shape
    size = n, channels, height, width
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if differentiated_again(grad):
        return pull(reference.conv3x3, ctx.saved_tensors, grad)
    grads = fused_conv3x3_backward(grad, *ctx.saved_tensors, *wanted)
    return tuple(found if needed else None for found, needed in zip(grads, wanted, strict=True))


register_autograd(fused_conv3x3, _vjp, _setup)
