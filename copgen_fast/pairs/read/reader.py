"""Pairs by index for the loaders: whole shards held in memory where that is wanted, and what to do about corrupt ones.

In place of a corrupt pair comes the next one of the data set that is not (after the last, the first). That depends
on the data alone, so batches keep their size, and a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch.utils.data import Dataset

from copgen_fast.config import OnCorrupt
from copgen_fast.errors import CorruptArtifactError
from copgen_fast.pairs.codecs import REMEDY
from copgen_fast.pairs.read.dataset import EncodedPair, Pair, PairDataset

HeldShards = dict[int, "Future[bytes]"]
"""Shards being read or in memory, by number."""


class Reader:
    """Reads pairs of a data set; threads may share it.

    Args:
        on_corrupt: stop raises at a pair that can't be decoded; skip takes the next one in its place.
    """

    def __init__(self, dataset: Dataset, on_corrupt: OnCorrupt) -> None:
        self.dataset, self.on_corrupt = dataset, on_corrupt
        self._corrupt: set[int] = set()
        self._lock = threading.Lock()
        self._held: HeldShards = {}
        self._pool = ThreadPoolExecutor(1)  # one shard after the other: that is the point of reading whole ones

    @property
    def skipped(self) -> list[int]:
        """Pairs found corrupt so far, sorted."""
        return sorted(self._corrupt)

    def hold(self, numbers: Iterable[int]) -> HeldShards:
        """Start to read those of these shards that aren't held yet, and let go of all others."""
        kept = {n: shard for n, shard in self._held.items() if not (shard.done() and shard.exception())}
        self._held = {n: kept.get(n) or self._pool.submit(self.dataset.read_shard, n) for n in numbers}
        return self._held

    def pair(self, index: int, shards: HeldShards) -> Pair:
        """The pair, or the one in its place.

        Raises:
            CorruptArtifactError: it can't be decoded, and `on_corrupt` is stop.
        """
        if not isinstance(self.dataset, PairDataset):
            return self.dataset[index]
        while True:
            encoded = self._read(index, shards)
            try:
                return self.dataset.decode(encoded)
            except CorruptArtifactError as error:
                self._reject(encoded.index, error)

    def encoded(self, index: int, shards: HeldShards) -> tuple[EncodedPair, int]:
        """The pair, or the one in its place, with its images as they were encoded, and its label.

        Raises:
            CorruptArtifactError: its record is corrupt, and `on_corrupt` is stop.
        """
        while True:
            encoded = self._read(index, shards)
            try:
                return encoded, self.dataset.label(encoded)
            except CorruptArtifactError as error:
                self._reject(encoded.index, error)

    def _read(self, index: int, shards: HeldShards) -> EncodedPair:
        count = len(self.dataset)
        # An end to the search, whatever other threads find corrupt meanwhile.
        sound = next((i % count for i in range(index, index + count) if i % count not in self._corrupt), None)
        if sound is None:
            raise CorruptArtifactError(f"{self.dataset.folder}: every pair is corrupt: {REMEDY}")
        number = sound // self.dataset.index.shard_size
        return self.dataset.read(sound, shards[number].result() if number in shards else None)

    def _reject(self, index: int, error: CorruptArtifactError) -> None:
        if self.on_corrupt == "stop":
            raise CorruptArtifactError(f"{error}, or pass `--pretrain.on-corrupt skip` to go on without") from error
        with self._lock:
            new = index not in self._corrupt
            self._corrupt.add(index)
        if new:
            warnings.warn(f"corrupt pair {index} skipped, the next one comes in its place: {error}", stacklevel=2)
