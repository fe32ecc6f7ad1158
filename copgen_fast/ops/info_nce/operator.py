"""Row-wise cross-entropy over a similarity matrix that is not stored, and its gradient, as PyTorch operators.

    s_ij = rows_i . columns_j / temperature        rows [M, D], columns [K, D]
    loss_i = log sum_{j != self(i)} exp(s_ij) - s_{i, target(i)}

- columns None: the rows themselves, with exclude_self. The matrix is symmetric, which backends use.
- offset: the column that is row 0, where the columns are the rows of all processes.
- exclude_self: column offset + i is left out of row i's sum.
- shift: target(i) = offset + (i + shift) mod M; -1 for none: the loss is the log-sum-exp.
- bound: an upper bound of |s_ij|, but for rounding, or inf. Where exp cannot overflow within it, one shift serves
  all rows, and no running maximum is kept.
- precision: the dtype of the factors of a product; products are summed in float32, or float64.
- lse_i = temperature log sum_{j != self(i)} exp(s_ij), in units of products: exp(s_ij) divided by the sum is
  exp((rows_i . columns_j - lse_i) / temperature). A scaled product is rounded, by more than 1 where it is large,
  and then its exponential would be far off.

Memory is allocated here; a backend only fills it. The backward computes the similarities again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.backend import load
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.info_nce import chunked, reference
from copgen_fast.ops.library import operator, register_autograd


@dataclass(frozen=True)
class Similarity:
    """How similarities are computed."""

    temperature: float
    bound: float
    with_nearest: bool
    precision: torch.dtype
    backend: str


ROUGH = 2048
"""Logits within it are rounded by less than 2^-12 in float32."""


def _backend(name: str) -> Any:
    """A backend's row_losses and row_gradients, which fill their last arguments."""
    return chunked if name == "chunked" else load(name, "info_nce")


@operator("row_losses")
def row_losses(
    rows: Tensor,
    columns: Tensor | None,
    temperature: float,
    bound: float,
    offset: int,
    shift: int,
    exclude_self: bool,
    with_nearest: bool,
    precision: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [M], lse [M], and each row's nearest column [M] (int64) with its logit [M].

    The last two are empty unless `with_nearest`. Results have the rows' dtype, float32 or float64.
    """
    losses, lse, nearest, nearest_logit = _allocate(rows, with_nearest)
    inputs = (_rounded(rows, precision), _rounded(columns, precision))
    outputs = (losses, lse, *((nearest, nearest_logit) if with_nearest else (None, None)))
    _backend(backend).row_losses(*inputs, temperature, bound, offset, shift, exclude_self, *outputs)
    if bound > ROUGH:
        allow_for_rounding(lse, temperature)
    return losses, lse, nearest, nearest_logit


def allow_for_rounding(lse: Tensor, temperature: float) -> None:
    """Lower each lse by some roundings of a product where these make more than 2^-10 of a logit.

    The backward's products may be rounded otherwise; one that rules its row's sum must keep its share of 1.
    """
    margin = lse.abs().mul_(4 * torch.finfo(lse.dtype).eps)
    lse.sub_(F.threshold(margin, 2**-10 * temperature, 0, inplace=True))


def _allocate(rows: Tensor, with_nearest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = rows.shape[0]  # where shapes are symbols, len would fix them
    m_nearest = m if with_nearest else 0
    nearest = rows.new_empty(m_nearest, dtype=torch.int64)
    return rows.new_empty(m), rows.new_empty(m), nearest, rows.new_empty(m_nearest)


register_fake(row_losses, lambda rows, *rest: _allocate(rows, with_nearest=rest[6]))


def _rounded(x: Tensor | None, precision: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(precision).contiguous()


@operator("row_gradients")
def row_gradients(
    rows: Tensor,
    columns: Tensor | None,
    temperature: float,
    bound: float,
    row_lse: Tensor | None,
    row_grad: Tensor | None,
    column_lse: Tensor | None,
    column_grad: Tensor | None,
    offset: int,
    shift: int,
    exclude_self: bool,
    precision: torch.dtype,
    backend: str,
) -> Tensor:
    """Gradient [M, D] with respect to the rows, from that of losses, as rows (g, [M]) and as columns (h, [K]).

    sum_j W_ij columns_j / temperature, where W_ij adds, of what is given,
    g_i (p_ij - [j is i's target]) and h_j (q_ij - [j is i's target]), p and q the exponentials over the sum of the
    row's and of the column's log-sum-exp;
    no exponential where j is i itself. With columns None the row's numbers are the column's, too.
    """
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inputs = (_rounded(rows, precision), _rounded(columns, precision))
    statistics = (row_lse, row_grad, column_lse, column_grad)
    _backend(backend).row_gradients(*inputs, temperature, bound, *statistics, offset, shift, exclude_self, grad_rows)
    return grad_rows


register_fake(row_gradients, lambda rows, *_: torch.empty_like(rows, memory_format=torch.contiguous_format))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    rows, columns, ctx.temperature, ctx.bound, *ctx.placed, _, ctx.precision, ctx.backend = inputs
    ctx.save_for_backward(rows, columns, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for these would cost a launch each


def _vjp(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    rows, columns, lse = ctx.saved_tensors
    if differentiated_again(grad):
        return *_by_definition(grad, rows, columns, ctx.temperature, *ctx.placed), *[None] * 8
    scale = (ctx.temperature, ctx.bound)
    options = (*ctx.placed, ctx.precision, ctx.backend)
    statistics = (lse, grad.contiguous())
    grad_rows = grad_columns = None
    if ctx.needs_input_grad[0]:
        grad_rows = row_gradients(rows, columns, *scale, *statistics, None, None, *options)
    if columns is not None and ctx.needs_input_grad[1]:
        # The columns' roles are the rows' transposed only where columns and rows pair off.
        assert columns.shape[0] == rows.shape[0] and ctx.placed[0] == 0 and ctx.placed[1] in (0, -1)
        grad_columns = row_gradients(columns, rows, *scale, None, None, *statistics, *options)
    return grad_rows, grad_columns, *[None] * 8


register_autograd(row_losses, _vjp, _setup)


def _by_definition(
    grad: Tensor, rows: Tensor, columns: Tensor | None, temperature: float, *placed: int
) -> tuple[Tensor, Tensor | None]:
    def losses(rows: Tensor, columns: Tensor) -> Tensor:
        return reference.row_losses(rows, columns, temperature, *placed)

    if columns is not None:
        return pull(losses, (rows, columns), grad)
    return pull(lambda rows: losses(rows, rows), (rows,), grad)[0], None
