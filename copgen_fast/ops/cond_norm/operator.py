"""The conditional normalisation as PyTorch operators, for `torch.compile`, autograd and CUDA graphs.

Memory is allocated here, so that real and fake results agree; a backend only fills it. Scales and shifts are [N, C] in
the dtype of the arithmetic; an expanded row serves all samples.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.backend import load
from copgen_fast.ops.cond_norm import reference
from copgen_fast.ops.cond_norm.reference import layout_of
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.library import operator, register_autograd


def dense(x: Tensor) -> bool:
    """Whether x has no gaps in the memory format of the result."""
    return x.is_contiguous(memory_format=layout_of(x))


@operator("cond_norm")
def fused_cond_norm(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, backend: str) -> Tensor:
    """relu(x scale + shift) of x [N, C, H, W], upsampled by nearest 2 x or not."""
    y = _allocate(x, upsample)
    if y.numel():
        x = x.contiguous(memory_format=layout_of(x))
        load(backend, "cond_norm").cond_norm(x, _rows(scale), _rows(shift), upsample, y)
    return y


register_fake(fused_cond_norm, lambda x, scale, shift, upsample, backend: _allocate(x, upsample))


def _allocate(x: Tensor, upsample: bool) -> Tensor:
    n, channels, height, width = x.shape
    size = (2 * height, 2 * width) if upsample else (height, width)
    return torch.empty((n, channels, *size), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _rows(affine: Tensor) -> Tensor:
    """[N, C] with adjacent channels and any stride between rows."""
    return affine if affine.stride(1) == 1 else affine.contiguous()


@operator("cond_norm_", mutates=("x",))
def fused_cond_norm_(x: Tensor, scale: Tensor, shift: Tensor, backend: str) -> None:
    """Overwrite dense x by relu(x scale + shift)."""
    if x.numel():
        load(backend, "cond_norm").cond_norm(x, _rows(scale), _rows(shift), False, x)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


register_fake(fused_cond_norm_, lambda *_: None)


@operator("cond_norm_backward")
def fused_cond_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, with_affine: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, with `with_affine`, of scale and shift (else empty) from the gradient of the result."""
    grads = _allocate_grads(x, scale, with_affine)
    if grad.numel():
        layout = layout_of(x)
        grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
        affine_grads = grads[1:] if with_affine else (None, None)
        load(backend, "cond_norm").cond_norm_backward(
            grad, x, _rows(scale), _rows(shift), upsample, grads[0], *affine_grads
        )
    else:
        for empty_sum in grads[1:]:
            empty_sum.zero_()
    return grads


register_fake(
    fused_cond_norm_backward,
    lambda grad, x, scale, shift, upsample, with_affine, backend: _allocate_grads(x, scale, with_affine),
)


def _allocate_grads(x: Tensor, scale: Tensor, with_affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = scale.shape if with_affine else (0,)
    return _allocate(x, False), scale.new_empty(shape), scale.new_empty(shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.upsample, ctx.backend = inputs[3:]


def _vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if differentiated_again(grad):
        return *pull(partial(reference.cond_norm, upsample=ctx.upsample), ctx.saved_tensors, grad), None, None
    with_affine = any(ctx.needs_input_grad[1:3])
    grads = fused_cond_norm_backward(grad, *ctx.saved_tensors, ctx.upsample, with_affine, ctx.backend)
    return (*(grads if with_affine else (grads[0], None, None)), None, None)


register_autograd(fused_cond_norm, _vjp, _setup)
