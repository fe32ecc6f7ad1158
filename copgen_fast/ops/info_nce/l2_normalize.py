"""Both views' embeddings at unit length, in one matrix: what InfoNCE compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows no longer than this stay almost zero and take no gradient, which would be 1e12 times their neighbours'.
EPSILON = 1e-12


@torch.library.custom_op("copgen_fast::l2_normalize", mutates_args=())
def l2_normalize(anchors: Tensor, positives: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Rows x / max(|x|, 1e-12) of floating [N, D] twice, anchors first: [2N, D], and their lengths |x|, [2N].

    float64 for float64 inputs, else float32. `backend` is "triton", one launch, or "reference".
    """
    units, norms = _allocate(anchors, positives)
    if backend == "triton":
        from copgen_fast.kernels import l2_normalize

        l2_normalize.l2_normalize(anchors, positives, units, norms)
        return units, norms
    torch.cat([anchors, positives], out=units)
    torch.linalg.vector_norm(units, dim=1, out=norms)
    return units.div_(norms.clamp_min(EPSILON)[:, None]), norms


@l2_normalize.register_fake
def _(anchors: Tensor, positives: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _allocate(anchors, positives)


def _allocate(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, positives.dtype), torch.float32)
    n, d = anchors.shape
    return anchors.new_empty((2 * n, d), dtype=dtype), anchors.new_empty(2 * n, dtype=dtype)


@torch.library.custom_op("copgen_fast::l2_normalize_backward", mutates_args=())
def l2_normalize_backward(
    grad: Tensor, anchors: Tensor, positives: Tensor, units: Tensor, norms: Tensor, backend: str
) -> Tensor:
    """Gradients of anchors and positives, [2N, D] in their dtype, from that of their unit rows [2N, D]."""
    grads = _allocate_grads(anchors, positives)
    if backend == "triton":
        from copgen_fast.kernels import l2_normalize

        l2_normalize.l2_normalize_backward(grad, anchors, positives, norms, *grads.chunk(2))
        return grads
    # Only what is at a right angle to the row moves its unit row.
    along = torch.linalg.vecdot(grad, units)[:, None]
    inverse = norms.reciprocal().masked_fill_(norms <= EPSILON, 0)[:, None]
    return torch.mul(torch.addcmul(grad, units, along, value=-1), inverse, out=grads)


@l2_normalize_backward.register_fake
def _(grad: Tensor, anchors: Tensor, positives: Tensor, units: Tensor, norms: Tensor, backend: str) -> Tensor:
    return _allocate_grads(anchors, positives)


def _allocate_grads(anchors: Tensor, positives: Tensor) -> Tensor:
    dtype = torch.promote_types(anchors.dtype, positives.dtype)
    return anchors.new_empty((2 * len(anchors), anchors.shape[1]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.backend = inputs[2]


def _vjp(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    of_anchors, of_positives = l2_normalize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.backend).chunk(2)
    return of_anchors, of_positives, None


l2_normalize.register_autograd(_vjp, setup_context=_setup)


def unit(x: Tensor) -> Tensor:
    """Rows of floating [N, D] at unit length in plain PyTorch: the definition of `l2_normalize`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scaled = x / norm.clamp_min(EPSILON)
    return torch.where(norm > EPSILON, scaled, scaled.detach())
