"""Conditional batch normalisation with folded statistics, and ReLU: a scale and a shift per sample and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.ops.cond_norm import reference
from copgen_fast.ops.cond_norm.operator import dense, fused_cond_norm, fused_cond_norm_
from copgen_fast.ops.derivatives import backend_for

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cond_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    upsample: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """relu(x * scale[n, c] + shift[n, c]), with `upsample` by nearest 2 x; differentiable in all three inputs.

    A conditional batch normalisation is this once its statistics are folded into its gain and bias. A fused backend
    reads x and writes the result once forward; backward it reads the gradient and x once, and sums the gradients of
    scale and shift on the way, in an order that depends on the shapes alone. It keeps x, scale and shift for the
    backward, which computes the ReLU's mask again.

    NaN of x stays NaN, as does its gradient; the ReLU's gradient at 0 is 0. Second and forward-mode
    derivatives and torch.func's transforms are the reference's.

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64, N >= 0. Contiguous and channels_last are taken as they
            are, others copied.
        scale, shift: [N, C], or [1, C] for all samples, of any floating dtype; on x's device.
        upsample: repeat each pixel 2 x 2 times.
        inplace: allow overwriting x, which happens where no input requires a gradient and x is dense.
        backend: a name from `backends()`; None takes the fastest.

    Returns:
        [N, C, H, W] or [N, C, 2H, 2W] of x's dtype, channels_last where the channels of x are adjacent. Computed in
        float32, or in float64 for float64.

    Raises:
        TypeError: an argument is no tensor or of another dtype.
        ValueError: an argument of another shape or device, an unknown backend, inplace with upsample.
    """
    expect_tensor("x", x, ("N", "C", "H", "W"), _DTYPES)
    n, channels = x.shape[:2]
    compute = torch.promote_types(x.dtype, torch.float32)
    affine = []
    for name, value in (("scale", scale), ("shift", shift)):
        expect_tensor(name, value, ("N", channels))
        one = value.shape[0] == 1
        if not one:
            expect_tensor(name, value, (n, channels))
        if value.device != x.device:
            raise ValueError(f"{name}: on {value.device}, but x is on {x.device}")
        value = value if value.dtype == compute else value.to(compute)
        affine.append(value.expand(n, -1) if one else value)
    if inplace and upsample:
        raise ValueError("inplace: an upsampled result does not fit into x; leave out inplace or upsample")
    backend = backend_for(resolve("cond_norm", x.device, backend), backend, x, scale, shift)
    if backend == "reference":
        return reference.cond_norm(x, *affine, upsample)
    differentiated = torch.is_grad_enabled() and any(y.requires_grad for y in (x, scale, shift))
    if inplace and not differentiated and dense(x):
        fused_cond_norm_(x, *affine, backend)
        return x
    return fused_cond_norm(x, *affine, upsample, backend)
