"""InfoNCE whose columns are every process's.

Embeddings are gathered whole: N D numbers of all processes are small beside a tile of similarities, and one
collective costs less waiting than the W steps of a ring. The backward sends two numbers a row, its log-sum-exp and
its gradient: with them a process computes what its rows are worth to the others' losses, so no gradient of
embeddings has to be reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.ops.info_nce.operator import Similarity, row_gradients, row_losses

# PyTorch 2.14 has a new name for it and warns of the old one.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def expect_equal_batches(argument: str, x: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError in every process unless x [N, ...] has one shape in all of them.

    Waits for the device: shapes that differ would hang or corrupt the gathering.
    """
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    if any(not torch.equal(other, shape) for other in shapes):
        by_rank = ", ".join(str(other.tolist()) for other in shapes)
        raise ValueError(f"{argument}: expected one shape on all ranks of the group, got {by_rank}")


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [N, ...] of all ranks, [W N, ...] in their order; no gradient passes."""
    parts = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
    _all_gather_flat(parts, x.detach().contiguous(), group=group)
    return parts


class Gather(torch.autograd.Function):
    """`gathered` with gradients: each rank's rows get the sum of what all ranks' losses say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.here = group, here(x, group)
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.here], None


class GroupRowLosses(torch.autograd.Function):
    """row_losses of this rank's rows [M, D] against all ranks' columns, or rows where columns is None.

    Gradients are those of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, shift: int, similarity: Similarity, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        all_columns = gathered(rows if columns is None else columns, group)
        s, placed = similarity, (here(rows, group).start, shift, columns is None)
        results = row_losses(rows, all_columns, s.temperature, s.bound, *placed, s.with_nearest, s.precision, s.backend)
        ctx.save_for_backward(rows, columns, all_columns, results[1])
        ctx.mark_non_differentiable(*results[1:])
        ctx.group, ctx.scale, ctx.options = group, (s.temperature, s.bound), (*placed, s.precision, s.backend)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, all_columns, lse = ctx.saved_tensors
        by_loss = (lse, grad.contiguous())
        all_by_loss = gathered(torch.stack(by_loss, 1), ctx.group).T.contiguous()
        if columns is None:
            grad_rows = row_gradients(rows, all_columns, *ctx.scale, *by_loss, *all_by_loss, *ctx.options)
            return grad_rows, *[None] * 4
        grad_rows = row_gradients(rows, all_columns, *ctx.scale, *by_loss, None, None, *ctx.options)
        all_rows = gathered(rows, ctx.group)
        grad_columns = row_gradients(columns, all_rows, *ctx.scale, None, None, *all_by_loss, *ctx.options)
        return grad_rows, grad_columns, *[None] * 3


def here(x: Tensor, group: dist.ProcessGroup) -> slice:
    """Where this rank's rows are among the gathered ones."""
    start = dist.get_rank(group) * len(x)
    return slice(start, start + len(x))
