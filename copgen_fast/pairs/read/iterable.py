"""Iterable data set of batches of pairs, for other training loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from copgen_fast.config import OnCorrupt, PairLoader, PretrainConfig
from copgen_fast.errors import UsageError
from copgen_fast.pairs.read.batch import PairBatch
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.read.loader import open_batches


class PairIterable(IterableDataset):
    """Batches of pairs, one epoch an iteration: the same batches, in the same order, as in the pretrain stage.

        pairs = PairIterable("runs/quickstart/pairs/navigator", batch=128, device="cuda")
        for epoch in range(pairs.epoch, 100):
            for batch in pairs:
                train(batch.anchors, batch.positives, batch.labels)  # uint8 [128, 3, H, W] twice, int64 [128]
                checkpoint["pairs"] = pairs.state_dict()

    A new iteration continues one that was left early. It prefetches in threads: a `DataLoader(pairs, batch_size=None)`
    may wrap it, without workers.

    Args:
        data: a folder that the pairs stage wrote, or a data set of (anchor, positive, label) as for `PairBatches`.
        batch: pairs in a batch, over all `world` processes; an epoch's last pairs that don't fill one are left out.
        device: where batches are returned.
        rank, world: see `Sampler`.
        workers, cache_gib, loader, shuffle_shards, on_corrupt: see `PretrainConfig`.

    Attributes:
        epoch: the epoch of the next batch.
        position: how many of its batches have been returned.
        skipped: corrupt pairs found and replaced so far, sorted.

    Raises:
        UsageError: pairs are missing, or don't form such batches.
        CorruptArtifactError: a shard is truncated or altered.
    """

    def __init__(
        self,
        data: str | Path | Dataset,
        batch: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        cache_gib: float = 0.0,
        loader: PairLoader = "auto",
        shuffle_shards: int | None = None,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        dataset = PairDataset(Path(data)) if isinstance(data, (str, Path)) else data
        options = PretrainConfig(
            batch=batch,
            workers=workers,
            cache_gib=cache_gib,
            loader=loader,
            shuffle_shards=shuffle_shards,
            on_corrupt=on_corrupt,
        )
        self._batches = open_batches(dataset, options, seed, torch.device(device), rank, world)
        # The order depends on these, and not on the number of processes.
        self._order = {"pairs": len(dataset), "batch": batch, "seed": seed, "shuffle_shards": shuffle_shards}
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches.steps_per_epoch

    @property
    def skipped(self) -> list[int]:
        return self._batches.skipped

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the current one continues where it is."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[PairBatch]:
        if get_worker_info() is not None:
            raise UsageError("PairIterable prefetches in threads: give DataLoader num_workers=0")
        while self.position < len(self):
            batch = self._batches(self.epoch * len(self) + self.position)
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int | None]:
        """Epoch, position and settings of the order, as plain numbers; batches returned so far count as done."""
        return {"epoch": self.epoch, "position": self.position, **self._order}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continue exactly where `state_dict` was called; the number of processes may differ.

        Raises:
            UsageError: the state's settings of the order differ.
        """
        saved = {name: state.get(name) for name in self._order}
        if saved != self._order:
            raise UsageError(f"the saved state is of {saved}, this is {self._order}: the order would differ")
        self.epoch, self.position = state["epoch"], state["position"]
