"""Peers of conditional normalisation: PyTorch's operators, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.runtime.machine import version

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers(upsample: bool) -> dict[str, Peer]:
    """Each takes x [N, C, H, W], scale and shift [N, C] to relu(scale x + shift), in x's dtype throughout."""
    run, name = (_upsampled, "addcmul, relu_, interpolate") if upsample else (_plain, "addcmul, relu_")
    torch.compiler.reset()  # it stops compiling after eight shapes
    found = {name: run, f"torch.compile of {name}": torch.compile(run, dynamic=False)}
    return {f"PyTorch {version('torch')}, {name}": peer for name, peer in found.items()}


def _plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = (y.to(x.dtype)[:, :, None, None] for y in (scale, shift))
    return torch.addcmul(shift, x, scale).relu_()


def _upsampled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.interpolate(_plain(x, scale, shift), scale_factor=2)
