"""Sampling of batches as a function of (seed, epoch, step) alone, so that resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import seeds


def permutation(count: int, epoch: int, seed: int, shard_size: int | None = None, window: int | None = None) -> Tensor:
    """The order of pairs in an epoch, an int64 permutation [count]; the same on every machine and after every resume.

    Args:
        window: None is one permutation of all pairs. W puts the shards in random order and permutes the pairs of W
            of them at a time, so that whole shards can be read one after the other; two pairs of one shard are then
            at most W x shard_size pairs apart.
        shard_size: pairs in a shard, for a window.
    """
    if window is None:
        return torch.randperm(count, generator=seeds.generator(seed, "order", epoch))
    found = []
    for number, shards in enumerate(windows(count, epoch, seed, shard_size, window)):
        pairs = torch.cat([torch.arange(i * shard_size, min(count, (i + 1) * shard_size)) for i in shards])
        found.append(pairs[torch.randperm(len(pairs), generator=seeds.generator(seed, "window order", epoch, number))])
    return torch.cat(found)


def windows(count: int, epoch: int, seed: int, shard_size: int, window: int) -> list[list[int]]:
    """Numbers of the shards whose pairs an epoch shuffles together, window by window."""
    shards = torch.randperm(-(-count // shard_size), generator=seeds.generator(seed, "shard order", epoch))
    return [numbers.tolist() for numbers in shards.split(window)]


@dataclass(frozen=True)
class Sampler:
    """Indices of one rank's batches, by global step (0 is the first of epoch 0).

    Every rank takes its own rows of the same global batch: all ranks together see what a single process would.
    An epoch's last pairs that don't fill a batch are left out.

    Attributes:
        count: pairs in the data set.
        batch: pairs in a global batch; rank r of `world` takes rows r x batch / world up to (r + 1) x batch / world.
        shard_size, window: as for `permutation`.
        steps: number of batches that will be used, after which none is prefetched; None: unknown.

    Raises:
        UsageError: fewer pairs than a batch, a batch that `world` doesn't divide, or a window without shards.
    """

    count: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1
    shard_size: int | None = None
    window: int | None = None
    steps: int | None = None
    _epochs: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.count < self.batch:
            raise UsageError(
                f"{self.count} pairs don't fill a batch of {self.batch}: lower the batch size or make more pairs"
            )
        if self.batch % self.world:
            raise UsageError(
                f"a batch of {self.batch} pairs can't be shared equally by {self.world} processes: choose a multiple"
            )
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank: expected 0 .. {self.world - 1}, got {self.rank}")
        if self.window is not None and (self.window < 1 or self.shard_size is None):
            raise UsageError(f"a window of {self.window} shards: expected at least 1, and shards of pairs")

    @property
    def rows(self) -> int:
        """Pairs in a batch of this rank."""
        return self.batch // self.world

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def indices(self, step: int) -> list[int]:
        """The pairs of this rank's batch of a step."""
        start = self.rank * self.rows
        return self.of_all_ranks(step)[start : start + self.rows]

    def of_all_ranks(self, step: int) -> list[int]:
        """The pairs of the whole batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[position * self.batch : (position + 1) * self.batch].tolist()

    def epoch(self, epoch: int) -> Tensor:
        """`permutation` of an epoch."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # prefetched batches reach into the next epoch
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = permutation(self.count, epoch, self.seed, self.shard_size, self.window)
        return self._epochs[epoch]

    def shards(self, step: int) -> list[int]:
        """Shards to keep in memory at a step: those of its batch's windows and of the window that follows."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.batch
        kept, end = [], 0
        for numbers in self._windows(epoch):
            past = end >= first + self.batch
            end += sum(min(self.shard_size, self.count - i * self.shard_size) for i in numbers)
            if end > first:
                kept += numbers
            if past:
                return kept
        return list(dict.fromkeys(kept + self._windows(epoch + 1)[0]))

    def _windows(self, epoch: int) -> list[list[int]]:
        return windows(self.count, epoch, self.seed, self.shard_size, self.window)


class CoverageCheck:
    """Asserts that each pair is used once an epoch, but for the last ones that don't fill a batch."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._next_step: int | None = None
        self._seen = torch.zeros(0, dtype=torch.bool)

    def record(self, step: int, indices: list[int]) -> None:
        """Record the pairs of a step's batch. After a jump, the epoch's batches before the step count as used.

        Raises:
            CopgenError: a pair came twice in an epoch, or pairs are missing at its end.
        """
        sampler = self.sampler
        epoch, position = divmod(step, sampler.steps_per_epoch)
        if step != self._next_step or position == 0:
            self._seen = torch.zeros(sampler.count, dtype=torch.bool)
            before = sampler.epoch(epoch)[: position * sampler.batch].view(position, sampler.world, sampler.rows)
            self._seen[before[:, sampler.rank].flatten()] = True
        rows = torch.tensor(indices)
        if len(rows) != len(rows.unique()) or self._seen[rows].any():
            raise CopgenError(f"the loader returned a pair twice in epoch {epoch}, at step {step}: this is a bug")
        self._seen[rows] = True
        self._next_step = step + 1
        if position + 1 < sampler.steps_per_epoch:
            return
        found, expected = int(self._seen.sum()), sampler.steps_per_epoch * sampler.rows
        if found != expected:
            raise CopgenError(f"the loader returned {found} of {expected} pairs in epoch {epoch}: this is a bug")
