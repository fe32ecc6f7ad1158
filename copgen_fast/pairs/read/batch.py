"""Batches of pairs, and what their loaders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.config import OnCorrupt
from copgen_fast.pairs.read.reader import Reader, Shards
from copgen_fast.pairs.read.sampler import CoverageCheck, Sampler

NO_LABEL = -1


class PairBatch(NamedTuple):
    """A batch of pairs: row i of the anchors and row i of the positives.

    Attributes:
        anchors, positives: uint8 [B, 3, H, W], channels_last from the loaders here. Several positives are
            [K, B, 3, H, W], the k-th of every anchor after the (k - 1)-th of all.
        labels: int64 [B], the class of each pair (real or pseudo); NO_LABEL where there is none.
    """

    anchors: Tensor
    positives: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """uint8 [(1 + K) B, 3, H, W], anchors first; a view where all lie in one tensor, as from the loaders here."""
        first, second = self.anchors, self.each_positive
        if len(second) > 1 and second.stride(0) != len(first) * first.stride(0):
            return torch.cat((first, second.flatten(0, 1)))
        count, second = 1 + len(second), second[0]
        distance = second.data_ptr() - first.data_ptr()  # in bytes, as uint8
        same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        if same and first.stride() == second.stride() and distance == len(first) * first.stride(0):
            return first.as_strided((count * len(first), *first.shape[1:]), first.stride())
        return torch.cat((first, self.each_positive.flatten(0, 1)))

    @property
    def each_positive(self) -> Tensor:
        """uint8 [K, B, 3, H, W], also where K is 1."""
        return self.positives[None] if self.positives.ndim == 4 else self.positives

    def with_one_positive(self, which: Tensor) -> PairBatch:
        """The pairs of each anchor and its positive of number `which` [B], counted from 0."""
        rows = torch.arange(len(which), device=self.positives.device)
        return self._replace(positives=self.each_positive[which.to(rows.device), rows])


def as_batch(images: Tensor, labels: Tensor) -> PairBatch:
    """The batch of images [1 + K, B, 3, H, W], anchors first; [1, B, 3, H, W] where each is its own positive."""
    return PairBatch(images[0], images[-1] if len(images) <= 2 else images[1:], labels)


class Ready(NamedTuple):
    """A batch made ahead of its step, maybe on another CUDA stream.

    Attributes:
        indices: its pairs.
        done: recorded when its tensors' work was queued on that stream; None: there is nothing to wait for.
    """

    indices: list[int]
    batch: PairBatch
    done: torch.cuda.Event | None

    def on_current_stream(self, device: torch.device) -> tuple[list[int], PairBatch]:
        """The pairs and the batch, which the device's current stream may use from here on."""
        if self.done is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(self.done)
            for tensor in self.batch:
                tensor.record_stream(current)
        return self.indices, self.batch


class Batches(ABC):
    """Shuffled batches by global step. The batch of a step depends on the data, the sampler and the step alone.

    Args:
        on_corrupt: see `Reader`.
        device: where batches are returned.

    Attributes:
        steps_per_epoch: batches in an epoch.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler, on_corrupt: OnCorrupt, device: torch.device) -> None:
        self.dataset, self.sampler, self.device = dataset, sampler, device
        self.steps_per_epoch = sampler.steps_per_epoch
        self._reader, self._coverage = Reader(dataset, on_corrupt), CoverageCheck(sampler)

    @property
    def skipped(self) -> list[int]:
        """Corrupt pairs found and replaced so far, sorted."""
        return self._reader.skipped

    def __call__(self, step: int) -> PairBatch:
        """The batch of a global step; 0 is the first of epoch 0.

        Raises:
            CorruptArtifactError: a pair can't be decoded, and `on_corrupt` is stop.
            CopgenError: a pair came twice in an epoch, or not at all: a bug.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        indices, batch = self._load(step)
        self._coverage.record(step, indices)
        return batch

    @abstractmethod
    def _load(self, step: int) -> tuple[list[int], PairBatch]:
        """The pairs of a step's batch, and the batch."""

    def _load_shards(self, step: int) -> Shards:
        """Start to read the whole shards of a step, where the sampler shuffles in windows."""
        if self.sampler.window is None:
            return {}
        numbers = self.sampler.shards(step)
        self._share(numbers)
        return self._reader.load_shards(numbers)

    def _first_read(self, step: int) -> list[int]:
        """Shards that this rank compares with their digests before it returns the batch of a step.

        Of the shards that all ranks read for the step, each is one rank's part, and no rank steps on before the others
        have their batches. A single process compares them as it reads.
        """
        if not hasattr(self.dataset, "checks") or self.sampler.world == 1:
            return []
        return self._share({self.dataset.shard_of(index) for index in self.sampler.of_all_ranks(step)})

    def _share(self, numbers: Iterable[int]) -> list[int]:
        return self.dataset.checks.share(numbers, self.sampler.rank, self.sampler.world)
