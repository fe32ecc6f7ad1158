"""InfoNCE's row losses and gradients in PyTorch operators, some rows at a time: the portable backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from copgen_fast.ops.backend import load, runs

# Entries of a chunk of the similarity matrix, of which some five exist at a time; a CPU's fit its cache.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 23


def row_losses(
    rows: Tensor,
    columns: Tensor | None,
    temperature: float,
    bound: float,
    offset: int,
    shift: int,
    exclude_self: bool,
    losses: Tensor,
    lse: Tensor,
    nearest: Tensor | None,
    nearest_logit: Tensor | None,
) -> None:
    """Fill losses, lse and, where given, nearest and nearest_logit; see `copgen_fast.ops.info_nce.operator`."""
    columns = rows if columns is None else columns
    fused = _epilogue(rows)
    for here, s in products(rows, columns):
        if fused is not None:
            filled = [x if x is None else x[here] for x in (losses, lse, nearest, nearest_logit)]
            fused.losses_of(s, temperature, here.start, len(rows), offset, shift, exclude_self, *filled)
            continue
        target = _targets(here, offset, shift, len(rows), rows.device)
        of_target = s.gather(1, target[:, None])[:, 0] if shift >= 0 else 0
        if exclude_self:
            s.diagonal(offset + here.start).fill_(-torch.inf)
        if nearest is None:
            top = s.amax(1)
        else:
            top, _ = torch.max(s, dim=1, out=(nearest_logit[here], nearest[here]))
        log_sum = s.sub_(top[:, None]).div_(temperature).logsumexp(1)
        torch.add((top - of_target).div_(temperature), log_sum, out=losses[here])
        torch.add(top, log_sum.mul_(temperature), out=lse[here])
    if nearest_logit is not None and fused is None:
        nearest_logit.div_(temperature)


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
    grad_rows: Tensor,
) -> None:
    """Fill grad_rows; see `copgen_fast.ops.info_nce.operator`."""
    if columns is None:
        columns, column_lse, column_grad = rows, row_lse, row_grad
    fused = _epilogue(rows)
    for here, s in products(rows, columns):
        if fused is not None:
            statistics = (*(x if x is None else x[here] for x in (row_lse, row_grad)), column_lse, column_grad)
            fused.weigh(s, temperature, here.start, len(rows), offset, shift, exclude_self, *statistics)
            torch.mm(s, columns, out=grad_rows[here]).div_(temperature)
            continue
        weights = torch.zeros_like(s)
        of_target = s.new_zeros(len(s), 1)
        target = _targets(here, offset, shift, len(rows), rows.device)[:, None]
        if row_lse is not None:
            weights.addcmul_((s - row_lse[here, None]).div_(temperature).clamp_(max=0).exp_(), row_grad[here, None])
            of_target += row_grad[here, None]
        if column_lse is not None:
            weights.addcmul_(s.sub_(column_lse).div_(temperature).clamp_(max=0).exp_(), column_grad)
            of_target += column_grad[target]
        if exclude_self:
            weights.diagonal(offset + here.start).zero_()
        if shift >= 0:
            weights.scatter_(1, target, weights.gather(1, target) - of_target)
        torch.mm(weights, columns, out=grad_rows[here]).div_(temperature)


def products(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows, and their products with all columns."""
    chunk = max(1, _CHUNK.get(rows.device.type, _CHUNK_ELSEWHERE) // len(columns))
    for start in range(0, len(rows), chunk):
        here = slice(start, min(start + chunk, len(rows)))
        # Autocast, in which a backward may run, leaves products alone that are given their place.
        s = rows.new_empty(here.stop - start, len(columns))
        yield here, torch.mm(rows[here], columns.T, out=s)


def _epilogue(rows: Tensor) -> Any:
    """Triton kernels that read each chunk once, for float32 on a GPU, or None."""
    usable = rows.is_cuda and rows.dtype == torch.float32 and runs("triton", rows.device)
    return load("triton", "epilogue") if usable else None


def _targets(here: slice, offset: int, shift: int, count: int, device: torch.device) -> Tensor:
    """Target column of each row of a slice; column 0 without targets."""
    if shift < 0:
        return torch.zeros(here.stop - here.start, dtype=torch.int64, device=device)
    return offset + (torch.arange(here.start, here.stop, device=device) + shift) % count
