"""Two players with opposite aims on one loss: gradient reversal, and freezing one while the other moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is negated (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # noqa: ANN001
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ANN001
        return -gradient


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Compute no gradients of a module's weights; they still pass through it to its input."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
