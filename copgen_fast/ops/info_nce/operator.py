"""The primitive of every contrastive loss as PyTorch operators: row by row, a log-sum-exp over a matrix of
similarities that is never stored, less the target's similarity; and its gradient.

    s_ij = rows_i . columns_j / temperature        rows [M, D], columns [K, D]
    loss_i = log sum_{j != self(i)} exp(s_ij) - s_{i, target(i)}

- columns None: the rows themselves, each left out of its own sum. The matrix is symmetric, which backends use.
- offset: the column that is row 0, where columns hold more than the rows (those of every process, say).
- exclude_self: column offset + i is left out of row i's sum.
- shift: target(i) = offset + (i + shift) mod M; -1 for none: the loss is the log-sum-exp.
- bound: about the largest |s_ij| there can be, inf for unknown. Where exp cannot overflow within it, one shift
  serves all rows, and no running maximum is kept.
- precision: what rows and columns are rounded to before they are multiplied; products are summed in float32.

Memory is allocated here; a backend fills it. The backward computes the similarities again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """How rows are compared, and on what."""

    temperature: float
    bound: float
    with_nearest: bool
    precision: torch.dtype
    backend: str


def _backend(name: str) -> Any:
    """A backend's row_losses and row_gradients, which fill their last arguments."""
    if name == "cpp":
        import copgen_fast._cpp

        return torch.ops.copgen_fast_cpp
    if name == "cuda":
        import copgen_fast._cpp  # defines the operators that _cuda implements
        import copgen_fast._cuda  # noqa: F401

        return torch.ops.copgen_fast_cpp
    if name == "triton":
        from copgen_fast.kernels import info_nce

        return info_nce

    from copgen_fast.ops.info_nce import chunked

    return chunked


@torch.library.custom_op("copgen_fast::row_losses", mutates_args=())
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
    """Losses [M], log-sum-exps [M], and each row's nearest column [M] (int64) with its similarity [M].

    The last two are empty unless `with_nearest`. Results have the rows' dtype, float32 or float64.
    """
    losses, lse, nearest, similarity = _allocate(rows, with_nearest)
    inputs = (_rounded(rows, precision), _rounded(columns, precision))
    outputs = (losses, lse, *((nearest, similarity) if with_nearest else (None, None)))
    _backend(backend).row_losses(*inputs, temperature, bound, offset, shift, exclude_self, *outputs)
    return losses, lse, nearest, similarity


@row_losses.register_fake
def _(
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
    return _allocate(rows, with_nearest)


def _allocate(rows: Tensor, with_nearest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, m_nearest = len(rows), len(rows) if with_nearest else 0
    nearest = rows.new_empty(m_nearest, dtype=torch.int64)
    return rows.new_empty(m), rows.new_empty(m), nearest, rows.new_empty(m_nearest)


def _rounded(x: Tensor | None, precision: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(precision).contiguous()


@torch.library.custom_op("copgen_fast::row_gradients", mutates_args=())
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
    g_i (exp(s_ij - row_lse_i) - [j is i's target]) and h_j (exp(s_ij - column_lse_j) - [j is i's target]);
    no exponential where j is i itself. With columns None the row's numbers are the column's, too.
    """
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inputs = (_rounded(rows, precision), _rounded(columns, precision))
    statistics = (row_lse, row_grad, column_lse, column_grad)
    _backend(backend).row_gradients(*inputs, temperature, bound, *statistics, offset, shift, exclude_self, grad_rows)
    return grad_rows


@row_gradients.register_fake
def _(
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
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    rows, columns, ctx.temperature, ctx.bound, ctx.offset, ctx.shift, ctx.exclude_self, _, *rest = inputs
    ctx.precision, ctx.backend = rest
    ctx.save_for_backward(rows, columns, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _vjp(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, lse = ctx.saved_tensors
    scale = (ctx.temperature, ctx.bound)
    options = (ctx.offset, ctx.shift, ctx.exclude_self, ctx.precision, ctx.backend)
    by_loss = (lse, grad.contiguous())
    grad_rows = grad_columns = None
    if ctx.needs_input_grad[0]:
        grad_rows = row_gradients(rows, columns, *scale, *by_loss, None, None, *options)
    if columns is not None and ctx.needs_input_grad[1]:
        # The columns' roles are the rows' transposed only where columns and rows pair off.
        assert len(columns) == len(rows) and ctx.offset == 0 and ctx.shift in (0, -1)
        grad_columns = row_gradients(columns, rows, *scale, None, None, *by_loss, *options)
    return grad_rows, grad_columns, *[None] * 8


row_losses.register_autograd(_vjp, setup_context=_setup)
