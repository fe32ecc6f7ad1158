"""A ring buffer of normalised embeddings of past batches, in the checkpoint, the same on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.methods import Setting
from copgen_fast.methods._heads import full
from copgen_fast.ops.info_nce.group import all_gather

SIZE = 65_536
"""Rows of a queue where nothing else is said: MoCo's and NNCLR's."""
UNKNOWN = -1
_CHUNK = 1 << 22  # similarities that `nearest` has at a time: 16 MB of float32


class Queue(nn.Module):
    """Rows [Q, D], which start as random directions, and their classes.

    `offer` keeps a batch aside, `take_in` writes it over the oldest rows, going on at the start after the end: so the
    loss sees the queue as it was before its batch, also in its backward.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("labels", torch.full((size,), UNKNOWN))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # in all, also those overwritten since
        self._offered: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def offer(self, embeddings: Tensor, labels: Tensor | None, group: dist.ProcessGroup | None) -> None:
        """The rows that come in next: embeddings [n, D] of this rank, which are normalised, and their classes [n]."""
        rows = F.normalize(full(embeddings), dim=1).to(self.rows.dtype)
        if labels is None:
            labels = torch.full((len(rows),), UNKNOWN, device=rows.device)
        self._offered = (rows, labels) if group is None else (all_gather(rows, group), all_gather(labels, group))

    @torch.no_grad()
    def take_in(self) -> None:
        """Write the rows of all ranks that were offered, in the ranks' order."""
        rows, labels = self._offered
        places = (self.written + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows.index_copy_(0, places, rows)
        self.labels.index_copy_(0, places, labels)
        self.written += len(rows)

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """Indices [n] of the rows with the largest products with queries [n, D], some rows at a time."""
        best = queries.new_full((len(queries),), -torch.inf)
        found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        step = max(1, _CHUNK // len(queries))
        for start in range(0, len(self.rows), step):
            value, index = torch.mm(queries, self.rows[start : start + step].to(queries.dtype).T).max(1)
            nearer = value > best
            best, found = torch.where(nearer, value, best), torch.where(nearer, start + index, found)
        return found

    def unwritten(self) -> Tensor:
        """Share of the rows that are still random, []."""
        return (1 - self.written / len(self.rows)).clamp_min(0)


def fitted(config: Any, setting: Setting, rows: int) -> Any:
    """`config` with a size for its `queue`, of which each step writes `rows`: if None, SIZE, or the largest power of
    two in a quarter of a smaller data set.

    Raises:
        ValueError: a queue longer than the data set, whose rows are then views of what they are compared with, or
            shorter than what a step writes.
    """
    size = config.queue
    if size is None:
        size = max(rows, min(SIZE, 1 << max(0, (setting.pairs // 4).bit_length() - 1)))
    if size > setting.pairs:
        raise ValueError(
            f"a queue of {size} rows is larger than the data set of {setting.pairs} pairs, and would hold the pairs "
            "that it is compared with: choose a smaller --method.options queue=ROWS"
        )
    if size < rows:
        raise ValueError(
            f"a queue of {size} rows is shorter than the {rows} that each step writes: choose a larger "
            "--method.options queue=ROWS, or a smaller --pretrain.batch"
        )
    return replace(config, queue=size)
