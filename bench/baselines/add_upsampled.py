"""Peers of the addition of an upsampled shortcut and a bias: PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from copgen_fast.runtime.machine import version

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers(direction: str) -> dict[str, Peer]:
    """Each takes x [N, C, 2H, 2W], small [N, C, H, W] and bias [C] to x + upsampled small + bias."""
    found = {"add, interpolate, add": _interpolated}
    if direction == "forward":  # autograd would copy gradients for the view
        found["add_ twice, broadcast"] = _broadcast_
    return {f"PyTorch {version('torch')}, {name}": peer for name, peer in found.items()}


def _interpolated(x: Tensor, small: Tensor, bias: Tensor) -> Tensor:
    return x + bias[:, None, None] + F.interpolate(small, scale_factor=2)


def _broadcast_(x: Tensor, small: Tensor, bias: Tensor) -> Tensor:
    x.add_(bias[:, None, None])
    x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(small[:, :, :, None, :, None])
    return x
