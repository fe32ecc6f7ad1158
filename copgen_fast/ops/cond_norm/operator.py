"""The conditional normalisation as PyTorch operators: what `torch.compile`, autograd and CUDA graphs see.

Memory is allocated here, so that real and fake results agree; a backend only fills it. Scales and shifts are [N, C] in
the dtype that is computed in; their rows may be one and the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: torch.dtype) -> torch.dtype:
    """The arithmetic's dtype: float64 for float64, float32 for all others."""
    return torch.float64 if x == torch.float64 else torch.float32


def layout_of(x: Tensor) -> torch.memory_format:
    """That of the result: channels_last where x has its channels side by side."""
    beside = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if beside else torch.contiguous_format


def dense(x: Tensor) -> bool:
    """Whether backends take x as it is."""
    return x.is_contiguous(memory_format=layout_of(x))


def _backend(name: str) -> Any:
    """A backend's cond_norm and cond_norm_backward, which fill their last arguments."""
    if name == "cpp":
        import copgen_fast._cpp  # noqa: F401

        return torch.ops.copgen_fast_cpp
    from copgen_fast.kernels import cond_norm

    return cond_norm


@torch.library.custom_op("copgen_fast::cond_norm", mutates_args=())
def fused_cond_norm(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, backend: str) -> Tensor:
    """relu(x scale + shift) of x [N, C, H, W], of its size or twice that."""
    y = _allocate(x, upsample)
    if y.numel():
        x = x.contiguous(memory_format=layout_of(x))
        _backend(backend).cond_norm(x, _rows(scale), _rows(shift), upsample, y)
    return y


@fused_cond_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, backend: str) -> Tensor:
    return _allocate(x, upsample)


def _allocate(x: Tensor, upsample: bool) -> Tensor:
    n, channels, height, width = x.shape
    size = (2 * height, 2 * width) if upsample else (height, width)
    return torch.empty((n, channels, *size), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _rows(affine: Tensor) -> Tensor:
    """Channels side by side; rows may be apart, or one."""
    return affine if affine.stride(1) == 1 else affine.contiguous()


@torch.library.custom_op("copgen_fast::cond_norm_", mutates_args={"x"})
def fused_cond_norm_(x: Tensor, scale: Tensor, shift: Tensor, backend: str) -> None:
    """x, which is dense, becomes relu(x scale + shift)."""
    if x.numel():
        _backend(backend).cond_norm(x, _rows(scale), _rows(shift), False, x)


@torch.library.custom_op("copgen_fast::cond_norm_backward", mutates_args=())
def fused_cond_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, of_affine: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, if `of_affine`, of scale and shift, else empty; from that of the result."""
    grads = _allocate_grads(x, scale, of_affine)
    if grad.numel():
        layout = layout_of(x)
        grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
        of_both = grads[1:] if of_affine else (None, None)
        _backend(backend).cond_norm_backward(grad, x, _rows(scale), _rows(shift), upsample, grads[0], *of_both)
    else:
        for empty in grads[1:]:  # a sum of nothing
            empty.zero_()
    return grads


@fused_cond_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, of_affine: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_grads(x, scale, of_affine)


def _allocate_grads(x: Tensor, scale: Tensor, of_affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = scale.shape if of_affine else (0,)
    return _allocate(x, False), scale.new_empty(shape), scale.new_empty(shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.upsample, ctx.backend = inputs[3:]


def _vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_affine = any(ctx.needs_input_grad[1:3])
    grads = fused_cond_norm_backward(grad, *ctx.saved_tensors, ctx.upsample, of_affine, ctx.backend)
    return (*(grads if of_affine else (grads[0], None, None)), None, None)


fused_cond_norm.register_autograd(_vjp, setup_context=_setup)
