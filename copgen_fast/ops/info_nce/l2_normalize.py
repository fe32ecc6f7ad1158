"""L2 normalisation of both views' embeddings into one matrix, as PyTorch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.backend import load
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.library import operator, register_autograd

# Rows no longer than this stay almost zero and take no gradient, which would be 1e12 times that of other rows.
EPSILON = 1e-12


@operator("l2_normalize")
def l2_normalize(anchors: Tensor, positives: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Rows x / max(|x|, 1e-12) of anchors and positives, floating [N, D]: [2N, D], and their norms |x|, [2N].

    float64 for float64 inputs, else float32. `backend` is "cpp", "triton" or "reference".
    """
    units, norms = allocate(anchors, positives)
    if backend != "reference":
        load(backend, "l2_normalize").l2_normalize(anchors, positives, units, norms)
        return units, norms
    torch.cat([anchors, positives], out=units)
    torch.linalg.vector_norm(units, dim=1, out=norms)
    return units.div_(norms.clamp_min(EPSILON)[:, None]), norms


def allocate(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for unit rows [2N, D] and norms [2N] of anchors and positives [N, D]."""
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, positives.dtype), torch.float32)
    n, d = anchors.shape
    return anchors.new_empty((2 * n, d), dtype=dtype), anchors.new_empty(2 * n, dtype=dtype)


register_fake(l2_normalize, lambda anchors, positives, backend: allocate(anchors, positives))


@operator("l2_normalize_backward")
def l2_normalize_backward(
    grad: Tensor, anchors: Tensor, positives: Tensor, units: Tensor, norms: Tensor, backend: str
) -> Tensor:
    """Gradients of anchors and positives, [2N, D] in their dtype, from the gradient of their unit rows [2N, D]."""
    grads = allocate_grads(anchors, positives)
    if backend == "triton":
        load(backend, "l2_normalize").l2_normalize_backward(grad, anchors, positives, norms, *grads.chunk(2))
        return grads
    if backend == "cpp":
        load(backend, "l2_normalize").l2_normalize_backward(grad, units, norms, grads)
        return grads
    # Only the part at a right angle to a row changes its unit row.
    along = torch.linalg.vecdot(grad, units)[:, None]
    inverse = norms.reciprocal().masked_fill_(norms <= EPSILON, 0)[:, None]
    return torch.mul(torch.addcmul(grad, units, along, value=-1), inverse, out=grads)


def allocate_grads(anchors: Tensor, positives: Tensor) -> Tensor:
    """Memory for gradients of anchors and positives, [2N, D]."""
    dtype = torch.promote_types(anchors.dtype, positives.dtype)
    return anchors.new_empty((2 * anchors.shape[0], anchors.shape[1]), dtype=dtype)


register_fake(l2_normalize_backward, lambda grad, anchors, positives, *_: allocate_grads(anchors, positives))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for it would cost a launch
    ctx.backend = inputs[2]


def _vjp(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    saved = ctx.saved_tensors
    if differentiated_again(grad):
        definition = lambda *inputs: l2_normalize_reference(torch.cat(inputs).to(grad.dtype))  # noqa: E731
        return *pull(definition, saved[:2], grad), None
    return *l2_normalize_backward(grad.contiguous(), *saved, ctx.backend).chunk(2), None


register_autograd(l2_normalize, _vjp, _setup)


def l2_normalize_reference(x: Tensor) -> Tensor:
    """Definition of `l2_normalize` in PyTorch operators: unit rows of floating [N, D]."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scaled = x / norm.clamp_min(EPSILON)
    return torch.where(norm > EPSILON, scaled, scaled.detach())
