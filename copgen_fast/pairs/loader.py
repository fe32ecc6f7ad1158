"""Reads shards of pairs: random access, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from copgen_fast import seeds
from copgen_fast.artifacts import require
from copgen_fast.checks import expect_tensor
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.pairs.format import (
    MEMBERS,
    REMEDY,
    check_file,
    decode_png,
    key,
    member_table,
    plan,
    read_complete_index,
)

Pair = tuple[Tensor, Tensor]


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
        """Anchor and positive, both uint8 [3, H, W]."""
        anchor, positive = self._read(index, (0, 1))
        return self._decode(index, 0, anchor), self._decode(index, 1, positive)

    def record(self, index: int) -> dict:
        """KEY.json of a pair: index, seed, pseudo_class, displacement."""
        try:
            return json.loads(self._read(index, (2,))[0])
        except ValueError as error:
            raise CorruptArtifactError(f"{self._where(index, 2)} is not valid JSON ({error}): {REMEDY}") from error

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all decoded images."""
        return 2 * self.index.count * int(np.prod(self.index.image_shape))

    def _where(self, index: int, column: int) -> str:
        name = self._spans[index // self.index.shard_size].name
        return f"{self.folder / name}: {key(index)}.{MEMBERS[column]}"

    def _decode(self, index: int, column: int, data: bytes) -> Tensor:
        image = decode_png(data, self._where(index, column))
        if tuple(image.shape) != self.index.image_shape:
            shape = list(image.shape)
            raise CorruptArtifactError(
                f"{self._where(index, column)} is {shape}, the index says {list(self.index.image_shape)}: {REMEDY}"
            )
        return image

    def _read(self, index: int, columns: tuple[int, ...]) -> list[bytes]:
        if not 0 <= index < self.index.count:
            raise IndexError(f"index: expected 0 .. {self.index.count - 1}, got {index}")
        number, row = divmod(index, self.index.shard_size)
        span = self._spans[number]
        path = self.folder / span.name
        if number not in self._tables:
            self._tables[number] = member_table(path, span.first, span.count)
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
        dataset: returns (anchor, positive), uint8 [3, H, W], all of one size: PairDataset, or one of real images.
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
        anchor, positive = dataset[0]
        expect_tensor("anchor", anchor, (3, "H", "W"), [torch.uint8])
        expect_tensor("positive", positive, tuple(anchor.shape), [torch.uint8])
        self.cached = 2 * anchor.nbytes * count <= cache_gib * 2**30
        self._epoch_order = (-1, torch.empty(0))
        if self.cached:
            self._images = torch.empty(2, count, *anchor.shape, dtype=torch.uint8)
            self._known = torch.zeros(count, dtype=torch.bool)
            self._pool = ThreadPoolExecutor(max(1, workers))
        else:
            self._iterator: Iterator[list[Tensor]] | None = None
            self._next_step = -1

    def __call__(self, step: int) -> Pair:
        """Anchors and positives of a global step (0 is the first of epoch 0), both uint8 [batch, 3, H, W]."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        return self._from_cache(step) if self.cached else self._from_workers(step)

    def _indices(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, order(len(self.dataset), epoch, self.seed))
        return self._epoch_order[1][position * self.batch : (position + 1) * self.batch]

    def _from_cache(self, step: int) -> Pair:
        indices = self._indices(step)
        unknown = indices[~self._known[indices]].tolist()
        for index, pair in zip(unknown, self._pool.map(self.dataset.__getitem__, unknown), strict=True):
            self._images[0, index], self._images[1, index] = pair
            self._known[index] = True
        return self._images[0, indices], self._images[1, indices]

    def _from_workers(self, step: int) -> Pair:
        if self._iterator is None or step != self._next_step:
            self._iterator = None  # ends the workers of the former one
            self._iterator = iter(
                DataLoader(
                    self.dataset,
                    batch_sampler=(self._indices(later).tolist() for later in itertools.count(step)),
                    num_workers=self.workers,
                    worker_init_fn=_leave_signals_to_parent,
                    generator=torch.Generator(),  # else it draws from the global one at each start
                )
            )
        anchors, positives = next(self._iterator)
        self._next_step = step + 1
        return anchors, positives


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C or a SIGTERM to the whole process group must not end workers under a parent that is about to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
