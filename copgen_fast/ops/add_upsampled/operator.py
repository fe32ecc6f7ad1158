"""The addition of an upsampled tensor as PyTorch operators, for `torch.compile`, autograd and CUDA graphs.

It is linear: its gradients need no values, and x's is the result's itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.add_upsampled import reference
from copgen_fast.ops.backend import load
from copgen_fast.ops.cond_norm.reference import layout_of
from copgen_fast.ops.derivatives import differentiated_again
from copgen_fast.ops.library import operator, register_autograd


@operator("add_upsampled")
def fused_add_upsampled(x: Tensor, small: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x [N, C, 2H, 2W] + small [N, C, H, W], upsampled by nearest, + bias [C]."""
    layout = layout_of(x)
    y = torch.empty_like(x, memory_format=layout)
    if y.numel():
        load(backend, "add_upsampled").add_upsampled(x.contiguous(memory_format=layout), small, bias, y)
    return y


register_fake(fused_add_upsampled, lambda x, *_: torch.empty_like(x, memory_format=layout_of(x)))


@operator("add_upsampled_", mutates=("x",))
def fused_add_upsampled_(x: Tensor, small: Tensor, bias: Tensor | None, backend: str) -> None:
    """Add to dense x in place."""
    if x.numel():
        load(backend, "add_upsampled").add_upsampled(x, small, bias, x)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


register_fake(fused_add_upsampled_, lambda *_: None)


@operator("add_upsampled_backward")
def fused_sum_by_four(grad: Tensor, backend: str) -> Tensor:
    """The gradient [N, C, H, W] of small: sums of 2 x 2 pixels of the gradient [N, C, 2H, 2W]."""
    grad_small = _allocate_small(grad)
    if grad.numel():
        grad = grad.contiguous(memory_format=layout_of(grad))
        load(backend, "add_upsampled").sum_by_four(grad, grad_small)
    return grad_small


register_fake(fused_sum_by_four, lambda grad, backend: _allocate_small(grad))


def _allocate_small(grad: Tensor) -> Tensor:
    n, channels, height, width = grad.shape
    shape = (n, channels, height // 2, width // 2)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout_of(grad))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, bias, ctx.backend = inputs
    ctx.of_bias = None if bias is None else bias.dtype


def _vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, of_small, of_bias, _ = ctx.needs_input_grad[:4]
    by_definition = ctx.backend == "reference" or differentiated_again(grad)
    grad_small = None
    if of_small:
        grad_small = reference.sum_by_four(grad) if by_definition else fused_sum_by_four(grad, ctx.backend)
    grad_bias = None
    if of_bias:  # of the sums where there are any: a quarter of the numbers, and of the roundings
        grad_bias = (grad if grad_small is None else grad_small).sum((0, 2, 3), dtype=ctx.of_bias)
    return grad, grad_small, grad_bias, None


register_autograd(fused_add_upsampled, _vjp, _setup)


def overwrite(x: Tensor, small: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x += small, upsampled, + bias; returns x, which is dense unless the backend is the reference."""
    if backend == "reference":
        reference.add_upsampled_(x, small, bias)
    else:
        fused_add_upsampled_(x, small, bias, backend)
    return x


class InPlace(torch.autograd.Function):
    """Addition in place without a view of x, for which autograd would copy x's whole gradient twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, small: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.mark_dirty(x)
        _setup(ctx, (x, small, bias, backend), x)
        return overwrite(x, small, bias, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _vjp(ctx, grad)
