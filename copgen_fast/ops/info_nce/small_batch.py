"""NT-Xent of a small batch on the CPU: normalisation and losses in one operator, whose backward reads the matrix.

Of up to `MOST_ROWS` rows the matrix of similarities fits a CPU's cache: kept, it saves the backward one product of
two. One operator for normalisation and losses, as a call through Python takes a good part of such a batch's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.backend import load
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.info_nce import reference
from copgen_fast.ops.info_nce.l2_normalize import allocate, allocate_grads, l2_normalize_reference
from copgen_fast.ops.info_nce.operator import ROUGH, allow_for_rounding
from copgen_fast.ops.library import operator, register_autograd

MOST_ROWS = 1024
"""Most rows, anchors and positives, of a batch whose matrix is kept: 4 MB of float32."""


@operator("pair_losses")
def pair_losses(
    anchors: Tensor, positives: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent losses [2N] of floating anchors and positives [N, D], and what the backward needs.

    That is lse [2N] as of `copgen_fast.ops.info_nce.operator`, unit rows [2N, D], norms [2N] and the matrix: 4 N^2
    exponentials, or products where the temperature is too low to bound exponentials. Only C++ knows its order.
    """
    outputs = _allocate(anchors, positives)
    load("cpp", "info_nce").pair_losses(anchors, positives, temperature, *outputs)
    if 1 / temperature > ROUGH:
        allow_for_rounding(outputs[1], temperature)
    return outputs


def _allocate(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    units, norms = allocate(anchors, positives)
    return torch.empty_like(norms), torch.empty_like(norms), units, norms, units.new_empty(units.shape[0] ** 2)


register_fake(pair_losses, lambda anchors, positives, temperature: _allocate(anchors, positives))


@operator("pair_gradients")
def pair_gradients(
    grad: Tensor,
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    lse: Tensor,
    units: Tensor,
    norms: Tensor,
    matrix: Tensor,
) -> Tensor:
    """Gradients of anchors and positives, [2N, D] in their dtype, from the gradient of their losses [2N]."""
    grads = allocate_grads(anchors, positives)
    load("cpp", "info_nce").pair_gradients(grad, temperature, lse, units, norms, matrix, grads)
    return grads


register_fake(pair_gradients, lambda grad, anchors, positives, *_: allocate_grads(anchors, positives))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for these would cost a matrix
    ctx.temperature = inputs[2]


def _vjp(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    anchors, positives, *saved = ctx.saved_tensors
    if differentiated_again(grad):

        def losses(*inputs: Tensor) -> Tensor:
            rows = l2_normalize_reference(torch.cat(inputs).to(grad.dtype))
            return reference.row_losses(rows, rows, ctx.temperature, 0, len(inputs[0]), True)

        return *pull(losses, (anchors, positives), grad), None
    return *pair_gradients(grad.contiguous(), anchors, positives, ctx.temperature, *saved).chunk(2), None


register_autograd(pair_losses, _vjp, _setup)
