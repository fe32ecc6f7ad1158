"""Copies of networks whose weights are exponential moving averages of theirs."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class Ema(nn.Module):
    """A copy of modules applied in sequence; no gradient.

    Parameters follow by `update`. Buffers (batch norm's running statistics) are its own, from its own forwards, which
    take batch statistics in training as the originals do.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    @torch.no_grad()
    def update(self, decay: float, *modules: nn.Module) -> None:
        """w <- decay w + (1 - decay) w', of the parameters w' of the modules as they are now."""
        new = [parameter for module in modules for parameter in module.parameters()]
        torch._foreach_lerp_(list(self.parameters()), new, 1 - decay)


def rising(decay: float, progress: float) -> float:
    """BYOL's schedule: from `decay` at the start to 1 at the end, 1 - (1 - decay)(1 + cos(pi progress)) / 2."""
    return 1 - (1 - decay) * (1 + math.cos(math.pi * progress)) / 2
