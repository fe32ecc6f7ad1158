"""Definition of the addition of an upsampled tensor in PyTorch operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.cond_norm.reference import layout_of


def add_upsampled(x: Tensor, small: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, 2H, 2W] + small [N, C, H, W], each pixel repeated 2 x 2 times, + bias [C], rounded once."""
    y = _by_four(x) + _addend(small, bias)
    return y.flatten(4).flatten(2, 3).to(x.dtype).contiguous(memory_format=layout_of(x))


def add_upsampled_(x: Tensor, small: Tensor, bias: Tensor | None) -> None:
    """Add to x in place."""
    by_four = _by_four(x)
    by_four += _addend(small, bias)


def sum_by_four(grad: Tensor) -> Tensor:
    """The gradient [N, C, H, W] of small: sums of 2 x 2 pixels."""
    return F.avg_pool2d(grad, 2, divisor_override=1)


def _by_four(x: Tensor) -> Tensor:
    """[N, C, H, 2, W, 2]."""
    return x.unflatten(3, (x.shape[3] // 2, 2)).unflatten(2, (x.shape[2] // 2, 2))


def _addend(small: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C, H, 1, W, 1]; a constant upsampled is that constant."""
    if bias is not None:
        compute = torch.promote_types(small.dtype, torch.float32)
        small = small.to(compute) + bias.to(compute)[:, None, None]
    return small[:, :, :, None, :, None]
