"""Both views' embeddings at unit length, in one matrix: what InfoNCE compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows no longer than this stay almost zero and take no gradient, which would be 1e12 times their neighbours'.
EPSILON = 1e-12


@torch.library.custom_op("copgen_fast::unit_rows", mutates_args=())
def unit_rows(anchors: Tensor, positives: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Rows x / max(|x|, 1e-12) of floating [N, D] twice, anchors first: [2N, D], and their lengths |x|, [2N].

    float64 for float64 inputs, else float32. `backend` is "triton", one launch, or "reference".
    """
    units, norms = _allocate(anchors, positives)
    if backend == "triton":
        from copgen_fast.kernels import unit_rows

        unit_rows.unit_rows(anchors, positives, units, norms)
        return units, norms
    for source, unit, norm in zip((anchors, positives), units.chunk(2), norms.chunk(2), strict=True):
        torch.linalg.vector_norm(source, dim=1, dtype=norms.dtype, out=norm)
        torch.div(source, norm.clamp_min(EPSILON)[:, None], out=unit)
    return units, norms


@unit_rows.register_fake
def _(anchors: Tensor, positives: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _allocate(anchors, positives)


def _allocate(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, positives.dtype), torch.float32)
    n, d = anchors.shape
    return anchors.new_empty((2 * n, d), dtype=dtype), anchors.new_empty(2 * n, dtype=dtype)


@torch.library.custom_op("copgen_fast::unit_rows_backward", mutates_args=())
def unit_rows_backward(
    grad: Tensor, anchors: Tensor, positives: Tensor, norms: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and positives, each [N, D], from that of their unit rows [2N, D]."""
    grads = torch.empty_like(anchors), torch.empty_like(positives)
    if backend == "triton":
        from copgen_fast.kernels import unit_rows

        unit_rows.unit_rows_backward(grad, anchors, positives, norms, *grads)
        return grads
    parts = zip((anchors, positives), grad.chunk(2), norms[:, None].chunk(2), grads, strict=True)
    for x, of_unit, norm, of_x in parts:
        # Only what is at a right angle to the row moves its unit row.
        along = (of_unit * x).sum(1, keepdim=True) / norm.square()
        at_right_angle = torch.addcmul(of_unit, x, along, value=-1).div_(norm)
        of_x.copy_(at_right_angle.masked_fill_(norm <= EPSILON, 0))
    return grads


@unit_rows_backward.register_fake
def _(grad: Tensor, anchors: Tensor, positives: Tensor, norms: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(anchors), torch.empty_like(positives)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.backend = inputs[2]


def _vjp(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *unit_rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.backend), None


unit_rows.register_autograd(_vjp, setup_context=_setup)


def unit(x: Tensor) -> Tensor:
    """Rows of floating [N, D] at unit length in plain PyTorch: the definition of `unit_rows`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scaled = x / norm.clamp_min(EPSILON)
    return torch.where(norm > EPSILON, scaled, scaled.detach())
