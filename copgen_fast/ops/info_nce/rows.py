"""Every form of InfoNCE, row by row: row losses of the operators, and terms that are linear in the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.ops.backend import resolve
from copgen_fast.ops.info_nce.group import Gather, GroupRowLosses, all_gather, own_rows
from copgen_fast.ops.info_nce.l2_normalize import l2_normalize, l2_normalize_reference
from copgen_fast.ops.info_nce.operator import Similarity, row_losses
from copgen_fast.ops.info_nce.others import LogSumExpOfOthers
from copgen_fast.ops.info_nce.small_batch import MOST_ROWS, pair_losses
from copgen_fast.ops.info_nce.sum_by_label import sum_by_label


@dataclass(frozen=True)
class Form:
    """Form of the loss: checked arguments of `copgen_fast.ops.info_nce`."""

    temperature: float | Tensor
    symmetric: bool
    labels: Tensor | None
    negatives: Tensor | None
    in_batch: bool
    negative_ids: Tensor | None
    normalize: bool
    group: dist.ProcessGroup | None
    views: int = 2
    """Of each pair: of its anchor and its positives."""


def info_nce_rows(
    anchors: Tensor, positives: Tensor, form: Form, similarity: Similarity
) -> tuple[Tensor, Tensor | None]:
    """Losses [M], and whether each row's nearest column is a positive (None without `similarity.with_nearest`).

    M = 2N rows, anchors first, when symmetric ((1 + K) N of K positives); N otherwise. Rows are divided by the root of
    a temperature that is a tensor, so that autograd gives its gradient; `similarity.temperature` is 1 then.
    """
    n = len(anchors)
    if _is_small(n, form, similarity):
        return pair_losses(anchors, positives, similarity.temperature)[0], None
    with torch.autocast(anchors.device.type, enabled=False):
        if form.normalize and form.views == 2:
            views = l2_normalize(anchors, positives, resolve("l2_normalize", anchors.device))[0]
        else:
            views = _joined(anchors, positives)
            views = l2_normalize_reference(views) if form.normalize else views
        root = form.temperature.to(views.dtype).sqrt() if isinstance(form.temperature, Tensor) else None
        views = views if root is None else views / root
        rows, columns = (views, None) if form.symmetric else (views[:n], views[n:])
        if form.labels is None and form.negatives is None and form.views == 2:
            losses, _, nearest, _ = _compare(rows, columns, n if form.symmetric else 0, form, similarity)
            return losses, _is_positive(nearest, n, form) if similarity.with_nearest else None
        to_positive = (rows * _mean_positive(rows, columns, n, form)).sum(1) / similarity.temperature
        lse, nearest_logit, correct = to_positive, to_positive.detach(), None
        if form.in_batch:
            lse, _, nearest, nearest_logit = _compare(rows, columns, -1, form, similarity)
            correct = _is_positive(nearest, n, form) if similarity.with_nearest else None
        if form.negatives is not None:
            bank_lse, bank_logit = _compare_with_bank(rows if root is None else rows / root, form, similarity)
            lse = torch.logaddexp(lse, bank_lse)
            if similarity.with_nearest:
                nearer = nearest_logit >= bank_logit
                correct = nearer if correct is None else correct & nearer
        return lse - to_positive, correct


def _is_small(n: int, form: Form, similarity: Similarity) -> bool:
    """Whether these are the losses of `pair_losses`, and so few that it is the fastest."""
    plain = form.symmetric and form.normalize and form.views == 2 and not isinstance(form.temperature, Tensor)
    alone = form.labels is None and form.negatives is None and form.group is None
    return similarity.backend == "cpp" and plain and alone and not similarity.with_nearest and 2 * n <= MOST_ROWS


def _joined(anchors: Tensor, positives: Tensor) -> Tensor:
    joined = torch.cat([anchors, positives.flatten(0, -2)])
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _compare(
    rows: Tensor, columns: Tensor | None, shift: int, form: Form, s: Similarity
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_losses against the columns of all ranks; without columns against the rows."""
    if form.group is not None:
        return GroupRowLosses.apply(rows, columns, shift, s, form.group)
    options = (columns is None, s.with_nearest, s.precision, s.backend)
    return row_losses(rows, columns, s.temperature, s.bound, 0, shift, *options)


def _compare_with_bank(rows: Tensor, form: Form, s: Similarity) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the queue of negatives, which take no gradient, and the nearest one's logit."""
    bank = form.negatives.detach().to(rows.dtype)
    bank = l2_normalize_reference(bank) if form.normalize else bank
    if form.negative_ids is not None:
        views = form.views if form.symmetric else 1
        pairs = _pairs(len(rows) // views, form, rows.device).repeat(views)
        lse = LogSumExpOfOthers.apply(rows, bank, pairs, form.negative_ids, s.temperature)
        return lse, lse
    options = (s.with_nearest, s.precision, s.backend)
    lse, _, _, nearest_logit = row_losses(rows, bank, s.temperature, s.bound, 0, -1, False, *options)
    return lse, nearest_logit


def _pairs(n: int, form: Form, device: torch.device) -> Tensor:
    """Numbers of this rank's n pairs among those of all ranks."""
    first = 0 if form.group is None else n * dist.get_rank(form.group)
    return torch.arange(first, first + n, device=device)


def _ids(n: int, form: Form, device: torch.device) -> tuple[Tensor, Tensor]:
    """Identifiers of rows [M] and columns [K]; those of a row and of its positives are equal."""
    ids = _pairs(n, form, device)
    if form.labels is not None:
        ids = torch.where(form.labels < 0, -1 - ids, form.labels)
    row_ids = ids.repeat(form.views) if form.symmetric else ids
    return row_ids, row_ids if form.group is None else all_gather(row_ids, form.group)


def _is_positive(columns: Tensor, n: int, form: Form) -> Tensor:
    """Whether column columns_i is a positive of row i, [M]."""
    row_ids, column_ids = _ids(n, form, columns.device)
    return column_ids[columns] == row_ids


def _mean_positive(rows: Tensor, columns: Tensor | None, n: int, form: Form) -> Tensor:
    """Mean of each row's positives, [M, D]."""
    if form.labels is None and form.views == 2:
        return rows.roll(n, 0) if columns is None else columns
    candidates = rows if columns is None else columns
    everyone = candidates if form.group is None else Gather.apply(candidates, form.group)
    _, ids = _ids(n, form, rows.device)
    sums, counts = sum_by_label(everyone, ids), sum_by_label(rows.new_ones(len(ids), 1), ids)
    if form.group is not None:
        sums, counts = sums[own_rows(rows, form.group)], counts[own_rows(rows, form.group)]
    return sums / counts if columns is not None else (sums - rows) / (counts - 1)
