"""Reads shards of pairs: random access, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from copgen_fast import seeds
from copgen_fast.artifacts import require
from copgen_fast.checks import expect_tensor
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.pairs.codecs import CODECS, REMEDY
from copgen_fast.pairs.format import (
    check_file,
    key,
    member_table,
    members,
    plan,
    read_complete_index,
)

NO_LABEL = -1


class PairBatch(NamedTuple):
    """A batch of pairs; rows i belong together.

    Attributes:
        anchors, positives: uint8 [B, 3, H, W].
        labels: int64 [B], the class of each pair (real or pseudo); NO_LABEL where there is none.
    """

    anchors: Tensor
    positives: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """uint8 [2B, 3, H, W], anchors first."""
        return torch.cat((self.anchors, self.positives))

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


Pair = tuple[Tensor, Tensor, int]
"""Anchor and positive, both uint8 [3, H, W], and the label."""


class PairDataset(Dataset):
    """The pairs of a folder, in their order.

    Args:
        folder: what `write_pairs` wrote.
        check: compare every shard's size and sha256 with the index first.

    Raises:
        UsageError: the index or shards are missing.
        CorruptArtifactError: a shard is truncated or altered; the message names it.
    """

    def __init__(self, folder: Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = read_complete_index(self.folder)
        self._spans = plan(self.index.count, self.index.shard_size)
        self._tables: dict[int, np.ndarray] = {}
        for shard in self.index.shards:
            path = require(self.folder / shard.name, "pairs")
            if check:
                check_file(path, shard.bytes, shard.sha256)

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> Pair:
        """Anchor and positive, both uint8 [3, H, W], and the label: `label` of KEY.json, else its `pseudo_class`."""
        anchor, positive, record = self._read(index, (0, 1, 2))
        label = self._label(index, self._parse(index, record))
        return self._decode(index, 0, anchor), self._decode(index, 1, positive), label

    def record(self, index: int) -> dict:
        """KEY.json of a pair: index, seed, pseudo_class, displacement, and label where the generator was given one."""
        return self._parse(index, self._read(index, (2,))[0])

    def _parse(self, index: int, data: bytes) -> dict:
        try:
            return json.loads(data)
        except ValueError as error:
            raise CorruptArtifactError(f"{self._where(index, 2)} is not valid JSON ({error}): {REMEDY}") from error

    def _label(self, index: int, record: dict) -> int:
        label = record.get("label", record.get("pseudo_class"))
        if not isinstance(label, int):
            raise CorruptArtifactError(f"{self._where(index, 2)} holds no label or pseudo_class: {REMEDY}")
        return label

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all decoded images."""
        return 2 * self.index.count * int(np.prod(self.index.image_shape))

    def _where(self, index: int, column: int) -> str:
        name = self._spans[index // self.index.shard_size].name
        return f"{self.folder / name}: {key(index)}.{members(self.index.codec)[column]}"

    def _decode(self, index: int, column: int, data: bytes) -> Tensor:
        return CODECS[self.index.codec].decode(data, self.index.image_shape, self._where(index, column))

    def _read(self, index: int, columns: tuple[int, ...]) -> list[bytes]:
        if not 0 <= index < self.index.count:
            raise IndexError(f"index: expected 0 .. {self.index.count - 1}, got {index}")
        number, row = divmod(index, self.index.shard_size)
        span = self._spans[number]
        path = self.folder / span.name
        if number not in self._tables:
            self._tables[number] = member_table(path, span.first, span.count, self.index.codec)
        # Opened anew each time: thousands of shards would pass the limit on open files, and nothing is shared
        # between threads or worker processes.
        with open(path, "rb", buffering=0) as file:
            places = self._tables[number][row, list(columns)].tolist()
            return [os.pread(file.fileno(), size, offset) for offset, size in places]


def order(count: int, epoch: int, seed: int) -> Tensor:
    """Order of an epoch, an int64 permutation [count]; the same on every machine and after every resume."""
    return torch.randperm(count, generator=seeds.generator(seed, "order", epoch))


class PairBatches:
    """Shuffled batches by global step: `batches(step)` depends on the data, the batch size, the seed and the step.

    Where all decoded pairs fit into `cache_gib`, each is decoded once, when first asked for, and kept; else worker
    processes decode ahead of the step, and asking for any step but the next one starts them anew. Both give the
    same batches. torch's global generator is left alone.

    Args:
        dataset: returns (anchor, positive, label), images uint8 [3, H, W] of one size: PairDataset, or real images.
        batch: pairs in a batch; an epoch's last pairs that don't fill one are left out.
        workers: loader processes (0: decode in this one), or threads while the cache fills.

    Attributes:
        steps_per_epoch: batches in an epoch.
        cached: whether pairs are kept in memory.

    Raises:
        UsageError: less than one batch of pairs.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int, cache_gib: float, workers: int) -> None:
        count = len(dataset)
        if batch < 1 or count < batch:
            raise UsageError(f"{count} pairs don't fill a batch of {batch}: lower the batch size or make more pairs")
        self.dataset, self.batch, self.seed, self.workers = dataset, batch, seed, workers
        self.steps_per_epoch = count // batch
        anchor, positive, _ = dataset[0]
        expect_tensor("anchor", anchor, (3, "H", "W"), [torch.uint8])
        expect_tensor("positive", positive, tuple(anchor.shape), [torch.uint8])
        self.cached = 2 * anchor.nbytes * count <= cache_gib * 2**30
        self._stream: Iterator[Sequence[Tensor]] = iter(())
        self._next_step: int | None = None
        if self.cached:
            self._images = torch.empty(2, count, *anchor.shape, dtype=torch.uint8)
            self._labels = torch.empty(count, dtype=torch.int64)
            self._known = torch.zeros(count, dtype=torch.bool)
            self._pool = ThreadPoolExecutor(max(1, workers))

    def __call__(self, step: int) -> PairBatch:
        """The batch of a global step; 0 is the first of epoch 0."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        if step != self._next_step:
            self._stream = iter(())  # ends the workers of the former one first
            self._stream = self._start(step)
        self._next_step = None  # should reading fail, the stream is of no further use
        batch = PairBatch(*next(self._stream))
        self._next_step = step + 1
        return batch

    def _start(self, step: int) -> Iterator[Sequence[Tensor]]:
        indices = _index_batches(len(self.dataset), self.batch, self.seed, step)
        if self.cached:
            return map(self._from_cache, indices)
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=indices,
                num_workers=self.workers,
                worker_init_fn=_leave_group,
                generator=torch.Generator(),  # else it draws from the global one at each start
            )
        )

    def _from_cache(self, indices: list[int]) -> PairBatch:
        rows = torch.tensor(indices)
        unknown = rows[~self._known[rows]].tolist()
        for index, pair in zip(unknown, self._pool.map(self.dataset.__getitem__, unknown), strict=True):
            self._images[0, index], self._images[1, index], self._labels[index] = pair
            self._known[index] = True
        return PairBatch(self._images[0, rows], self._images[1, rows], self._labels[rows])


def _index_batches(count: int, batch: int, seed: int, step: int) -> Iterator[list[int]]:
    """Indices of each batch from a global step on, without end."""
    first_epoch, position = divmod(step, count // batch)
    for epoch in itertools.count(first_epoch):
        batches = order(count, epoch, seed).split(batch)[: count // batch]
        yield from (indices.tolist() for indices in batches[position:])
        position = 0


def _leave_group(worker: int) -> None:
    """Signals to the process group (Ctrl-C, timeout's SIGTERM) must not end workers of a parent about to save.

    They still end with their parent. Ignoring the signals instead would hang the parent's exit, which sends SIGTERM.
    """
    os.setpgid(0, 0)
