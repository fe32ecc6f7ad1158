"""Addition of a tensor that is upsampled by nearest 2 x, and of a bias, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.ops.add_upsampled import reference
from copgen_fast.ops.add_upsampled.operator import InPlace, fused_add_upsampled, overwrite
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.ops.cond_norm.operator import dense
from copgen_fast.ops.cond_norm.reference import layout_of
from copgen_fast.ops.derivatives import backend_for, transformed

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_upsampled(
    x: Tensor, small: Tensor, bias: Tensor | None = None, *, inplace: bool = False, backend: str | None = None
) -> Tensor:
    """x + small, upsampled by nearest 2 x, + bias; differentiable in all three inputs.

    The last step of a residual block whose shortcut is computed at half the size. The fused backend reads x and small
    once and writes the result once; backward it reads the gradient once for that of small, and x's is the gradient
    itself. Second and forward-mode derivatives and torch.func's transforms are the reference's.

    Args:
        x: [N, C, 2H, 2W], float16, bfloat16, float32 or float64, N >= 0. Contiguous and channels_last are taken as they
            are, others copied.
        small: [N, C, H, W] of x's dtype and device, in any memory format, also a slice of channels.
        bias: [C] of any floating dtype on x's device, or None.
        inplace: overwrite x, also where gradients are wanted: they don't need its values. Not under transforms.
        backend: a name from `backends()`; None takes the fastest.

    Returns:
        [N, C, 2H, 2W] of x's dtype, channels_last where the channels of x are adjacent; with `inplace` x itself. Added
        in float32, or in float64 for float64, and rounded once.

    Raises:
        TypeError: an argument is no tensor or of another dtype.
        ValueError: an argument of another shape or device, an unknown backend.
    """
    expect_tensor("x", x, ("N", "C", "2H", "2W"), _DTYPES)
    n, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x: expected an even height and width, got {height} x {width}")
    expect_tensor("small", small, (n, channels, height // 2, width // 2), {x.dtype})
    if bias is not None:
        expect_tensor("bias", bias, (channels,))
    for name, value in (("small", small), ("bias", bias)):
        if value is not None and value.device != x.device:
            raise ValueError(f"{name}: on {value.device}, but x is on {x.device}")
    backend = backend_for(resolve("add_upsampled", x.device, backend), backend, x, small, bias)
    if transformed(x, small, bias):
        return reference.add_upsampled(x, small, bias)
    if backend != "reference" and not inplace:
        return fused_add_upsampled(x, small, bias, backend)
    x = x if inplace else x.clone(memory_format=layout_of(x))  # its copy's gradient is the result's, as in place
    chosen = backend if dense(x) else "reference"
    differentiated = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, small, bias))
    # torch.compile and torch.jit.trace refuse an autograd function that changes its input; no gradients need none.
    return (InPlace.apply if differentiated else overwrite)(x, small, bias, chosen)
