"""Reference implementation of InfoNCE in PyTorch operators, with the whole similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.ops.info_nce.l2_normalize import l2_normalize_reference


def info_nce_rows(
    anchors: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    symmetric: bool,
    labels: Tensor | None,
    negatives: Tensor | None,
    in_batch: bool,
    negative_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [M] of checked inputs, in at least float32, and whether each row's nearest column is a positive.

    M = 2N rows, anchors first, when symmetric ((1 + K) N of K positives); N otherwise.
    See `copgen_fast.ops.info_nce.functional`.
    """
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, positives.dtype), torch.float32)
    # Autocast would run the similarities in half precision, which a temperature of 0.01 magnifies 100 times.
    with torch.autocast(anchors.device.type, enabled=False):
        given = [
            x.to(dtype)
            for x in (anchors, positives.flatten(0, -2), *([] if negatives is None else [negatives.detach()]))
        ]
        a, p, *bank = map(l2_normalize_reference, given) if normalize else given
        rows = torch.cat([a, p]) if symmetric else a
        columns = rows if symmetric else p
        row = torch.arange(len(rows), device=rows.device)
        # The other views of row i are those whose number modulo N is its own; one-sided, it is the positive i.
        is_positive = (row % len(a))[:, None] == row % len(a)
        if labels is not None:
            row_labels = labels.repeat(len(rows) // len(a)) if symmetric else labels
            is_positive |= (row_labels[:, None] == row_labels) & (row_labels >= 0)
        logits = rows @ torch.cat([columns, *bank]).T / temperature
        is_positive = torch.nn.functional.pad(is_positive, (0, logits.shape[1] - len(columns)))
        column = torch.arange(logits.shape[1], device=rows.device)
        if symmetric:
            itself = torch.eye(*logits.shape, dtype=torch.bool, device=rows.device)
            logits, is_positive = logits.masked_fill(itself, -torch.inf), is_positive & ~itself
        if not in_batch:
            logits = logits.masked_fill(~is_positive & (column < len(columns)), -torch.inf)
        if negative_ids is not None:
            made_of_it = (negative_ids == (row % len(a))[:, None, None]).any(2)
            made_of_it = torch.nn.functional.pad(made_of_it, (len(columns), 0))
            logits = logits.masked_fill(made_of_it, -torch.inf)
        of_positives = torch.where(is_positive, logits, 0).sum(1) / is_positive.sum(1)
        nearest = is_positive.gather(1, logits.detach().argmax(1, keepdim=True))[:, 0]
        return logits.logsumexp(1) - of_positives, nearest


def row_losses(
    rows: Tensor, columns: Tensor, temperature: float, offset: int, shift: int, exclude_self: bool
) -> Tensor:
    """Losses [M] of `copgen_fast.ops.info_nce.operator.row_losses`."""
    row = torch.arange(len(rows), device=rows.device)
    logits = rows @ columns.T / temperature
    of_target = logits.gather(1, (offset + (row + shift) % len(rows))[:, None])[:, 0] if shift >= 0 else 0
    if exclude_self:
        itself = torch.arange(len(columns), device=rows.device) == (offset + row)[:, None]
        logits = logits.masked_fill(itself, -torch.inf)
    return logits.logsumexp(1) - of_target


def log_sum_exp_of_others(rows: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor, temperature: float) -> Tensor:
    """Definition of `copgen_fast.ops.info_nce.others.LogSumExpOfOthers`."""
    own = (ids[:, None, None] == column_ids).any(2)
    return (rows @ columns.T / temperature).masked_fill(own, -torch.inf).logsumexp(1)
