"""A generator's conditional normalisation with its ReLU: one scale and one shift for each sample and channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.ops.cond_norm.operator import compute_dtype, dense, fused_cond_norm, fused_cond_norm_, layout_of

__all__ = ["cond_norm", "cond_norm_reference"]

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
    """relu(x * scale[n, c] + shift[n, c]), upsampled by nearest 2 x where asked for; differentiable in all three.

    What is left of a batch normalisation with a condition once its statistics are folded into its gain and bias. A
    fused backend reads x once and writes the result once, whatever its size; backward it reads the gradient and x
    once and writes that of x, and sums those of scale and shift on the way, in an order that the shapes fix. For the
    backward it keeps x, scale and shift, and no result: where the ReLU let pass is computed again.

    A NaN of x stays one, as does its gradient; the ReLU's gradient at 0 is 0.

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64, N >= 0. Contiguous and channels_last are taken as they
            are, others copied.
        scale, shift: [N, C], or [1, C] for all samples, of any floating dtype; on x's device.
        upsample: give every pixel four times, [N, C, 2H, 2W].
        inplace: x may be overwritten: nothing else reads it. It is where no gradient is asked for and x is dense.
        backend: None for the fastest here; see `copgen_fast.ops.backends`.

    Returns:
        [N, C, H, W] or [N, C, 2H, 2W] of x's dtype, channels_last where x has its channels side by side. Computed in
        float32, or in float64 for float64.

    Raises:
        TypeError: an argument is no tensor or of another dtype.
        ValueError: an argument of another shape or device, an unknown backend, inplace with upsample.
    """
    expect_tensor("x", x, ("N", "C", "H", "W"), _DTYPES)
    n, channels = x.shape[:2]
    compute = compute_dtype(x.dtype)
    affine = []
    for name, value in (("scale", scale), ("shift", shift)):
        expect_tensor(name, value, ("N", channels))
        if len(value) != 1:
            expect_tensor(name, value, (n, channels))
        if value.device != x.device:
            raise ValueError(f"{name}: on {value.device}, but x is on {x.device}")
        affine.append(value.to(compute).expand(n, -1))
    if inplace and upsample:
        raise ValueError("inplace: what is upsampled does not fit into x; leave one of the two out")
    backend = resolve("cond_norm", x.device, backend)
    if backend == "reference":
        return cond_norm_reference(x, *affine, upsample)
    wanted = torch.is_grad_enabled() and any(y.requires_grad for y in (x, scale, shift))
    if inplace and not wanted and dense(x):
        fused_cond_norm_(x, *affine, backend)
        return x
    return fused_cond_norm(x, *affine, upsample, backend)


def cond_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool) -> Tensor:
    """`cond_norm` in PyTorch's operators, its definition; scales and shifts [N, C] in the dtype that is computed in."""
    y = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None]).relu_().to(x.dtype)
    if upsample:  # interpolate takes no empty images
        y = F.interpolate(y, scale_factor=2) if y.numel() else y.repeat(1, 1, 2, 2)
    return y.contiguous(memory_format=layout_of(x))
