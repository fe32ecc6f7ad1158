"""InfoNCE whose columns are the embeddings of all ranks of a process group.

One all-gather of the embeddings has less latency than the W steps of a ring. The backward gathers two numbers a row,
its log-sum-exp and its gradient, from which a rank computes its rows' gradient of the other ranks' losses: no gradient
of embeddings is reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.ops.derivatives import expect_no_graph
from copgen_fast.ops.info_nce.operator import Similarity, row_gradients, row_losses

# PyTorch 2.14 renamed it, and warns of the former name.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def expect_equal_batches(argument: str, x: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError on every rank unless x [N, ...] has one shape on all of them; waits for the device."""
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    if any(not torch.equal(other, shape) for other in shapes):
        by_rank = ", ".join(str(other.tolist()) for other in shapes)
        raise ValueError(f"{argument}: expected one shape on all ranks of the group, got {by_rank}")


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate x [N, ...] of all ranks: [W N, ...], without gradient."""
    parts = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
    _all_gather_flat(parts, x.detach().contiguous(), group=group)
    return parts


class Gather(torch.autograd.Function):
    """`all_gather` with gradients: those of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.own = group, own_rows(x, group)
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        expect_no_graph("group: a loss of several processes")
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.own], None


class GroupRowLosses(torch.autograd.Function):
    """row_losses of this rank's rows [M, D] against all ranks' columns, or rows where columns is None.

    Gradients are those of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, shift: int, similarity: Similarity, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        all_columns = all_gather(rows if columns is None else columns, group)
        s, placed = similarity, (own_rows(rows, group).start, shift, columns is None)
        results = row_losses(rows, all_columns, s.temperature, s.bound, *placed, s.with_nearest, s.precision, s.backend)
        ctx.save_for_backward(rows, columns, all_columns, results[1])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # zeros for these would cost a launch each
        ctx.group, ctx.scale, ctx.options = group, (s.temperature, s.bound), (*placed, s.precision, s.backend)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        expect_no_graph("group: a loss of several processes")
        rows, columns, all_columns, lse = ctx.saved_tensors
        statistics = (lse, grad.contiguous())
        all_statistics = all_gather(torch.stack(statistics, 1), ctx.group).T.contiguous()
        if columns is None:
            grad_rows = row_gradients(rows, all_columns, *ctx.scale, *statistics, *all_statistics, *ctx.options)
            return grad_rows, *[None] * 4
        grad_rows = row_gradients(rows, all_columns, *ctx.scale, *statistics, None, None, *ctx.options)
        all_rows = all_gather(rows, ctx.group)
        grad_columns = row_gradients(columns, all_rows, *ctx.scale, None, None, *all_statistics, *ctx.options)
        return grad_rows, grad_columns, *[None] * 3


def own_rows(x: Tensor, group: dist.ProcessGroup) -> slice:
    """Slice of this rank's rows among the gathered ones."""
    start = dist.get_rank(group) * len(x)
    return slice(start, start + len(x))
