"""Log-sum-exp of each row's similarities to the columns of other pairs, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.info_nce import reference
from copgen_fast.ops.info_nce.chunked import products


class LogSumExpOfOthers(torch.autograd.Function):
    """log sum_j exp(rows_i . columns_j / temperature) [M], over the columns j none of whose `column_ids` is row i's.

    Args:
        rows, columns: [M, D], which takes the gradient, and [K, D].
        ids, column_ids: integers [M] and [K, E]; a row without any column has -inf and takes no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor, temperature: float) -> Tensor:
        lse = rows.new_empty(len(rows))
        for here, s in _masked(rows, columns, ids, column_ids, temperature):
            torch.logsumexp(s, dim=1, out=lse[here])
        ctx.save_for_backward(rows, columns, ids, column_ids, lse)
        ctx.temperature = temperature
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, ids, column_ids, lse = ctx.saved_tensors
        if differentiated_again(grad):
            rest = {"columns": columns, "ids": ids, "column_ids": column_ids, "temperature": ctx.temperature}
            return *pull(partial(reference.log_sum_exp_of_others, **rest), (rows,), grad), *[None] * 4
        grad_rows = torch.empty_like(rows)
        finite = torch.where(lse.isneginf(), 0, lse)
        for here, s in _masked(rows, columns, ids, column_ids, ctx.temperature):
            weights = s.sub_(finite[here, None]).exp_().mul_(grad[here, None])
            torch.mm(weights, columns, out=grad_rows[here]).div_(ctx.temperature)
        return grad_rows, *[None] * 4


def _masked(
    rows: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    for here, s in products(rows, columns):
        s.div_(temperature)
        for of in column_ids.unbind(1):
            s.masked_fill_(ids[here, None] == of, -torch.inf)
        yield here, s
