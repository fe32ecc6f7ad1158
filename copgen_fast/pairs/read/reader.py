"""Thread-safe reading of pairs by index: whole shards in memory where wanted, corrupt pairs replaced.

A corrupt pair is replaced by the next one in the data set that is not (after the last, the first). That depends on
the data alone, so batches keep their size, and a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from copgen_fast.config import OnCorrupt
from copgen_fast.errors import CopgenError, CorruptArtifactError, CorruptItemError
from copgen_fast.images.codecs import Encoded
from copgen_fast.pairs.read.dataset import EncodedPair, Pair, PairDataset

Item = TypeVar("Item")
Shards = dict[int, "Future[bytes]"]
"""Shards in memory or being read, by number."""


class Reader:
    """Reads pairs of a data set; threads may share it.

    Args:
        on_corrupt: stop raises at a pair that can't be decoded; skip replaces it by the next one.
    """

    def __init__(self, dataset: Dataset, on_corrupt: OnCorrupt) -> None:
        self.dataset, self.on_corrupt = dataset, on_corrupt
        self._corrupt: set[int] = set()
        self._lock = threading.Lock()
        self._shards: Shards = {}
        self._pool = ThreadPoolExecutor(1)  # whole shards are read one after the other, for sequential access

    @property
    def skipped(self) -> list[int]:
        """Corrupt pairs found so far, sorted."""
        return sorted(self._corrupt)

    def load_shards(self, numbers: Iterable[int]) -> Shards:
        """Start to read those of these shards that are not in memory yet, and release all others."""
        kept = {n: shard for n, shard in self._shards.items() if not (shard.done() and shard.exception())}
        self._shards = {n: kept.get(n) or self._pool.submit(self.dataset.read_shard, n) for n in numbers}
        return self._shards

    def pair(self, index: int, shards: Shards) -> Pair:
        """The pair, or its replacement.

        Raises:
            CorruptArtifactError: it can't be decoded, and `on_corrupt` is stop.
        """
        return self._first_sound(index, lambda sound: self._pair(sound, shards))

    def fill(self, images: np.ndarray, labels: np.ndarray, indices: Sequence[int], shards: Shards) -> None:
        """Read pairs, or their replacements, into rows of a batch.

        Args:
            images: uint8 [V, N, H, W, 3], of the anchors, then of their positives; V = 1 where these are the same.
            labels: int64 [N].

        Raises:
            CorruptArtifactError: as for `pair`.
        """
        left = range(len(indices))
        if isinstance(self.dataset, PairDataset):
            pairs = [self._encoded_pair(self._sound(index), shards) for index in indices]
            left = self.dataset.decode_rows(pairs, images, labels)
        for row in left:
            anchor, positive, labels[row] = self.pair(indices[row], shards)
            for view, x in zip(images, (anchor, *positive.view(-1, *anchor.shape)), strict=False):
                view[row] = x.permute(1, 2, 0).numpy()

    def encoded(self, index: int, shards: Shards) -> Encoded:
        """The pair or its replacement, its images still encoded.

        Raises:
            CorruptArtifactError: its record or the size of an image is corrupt, and `on_corrupt` is stop.
        """
        return self._first_sound(index, lambda sound: self.dataset.encoded(sound, self._shard(sound, shards)))

    def _first_sound(self, index: int, read: Callable[[int], Item]) -> Item:
        while True:
            sound = self._sound(index)
            try:
                return read(sound)
            except CorruptItemError as error:  # an altered shard is none to go on without
                self._reject(sound, error)

    def _pair(self, index: int, shards: Shards) -> Pair:
        shard = self._shard(index, shards)
        return self.dataset[index] if shard is None else self.dataset.decode(self.dataset.read(index, shard))

    def _encoded_pair(self, index: int, shards: Shards) -> EncodedPair | None:
        """The pair as it lies in its shard; None: it can't be read, and `pair` says why."""
        try:
            return self.dataset.read(index, self._shard(index, shards))
        except CopgenError:
            return None

    def _shard(self, index: int, shards: Shards) -> bytes | None:
        """The bytes of an item's shard, where whole ones are read."""
        number = self.dataset.shard_of(index) if shards else None
        return shards[number].result() if number in shards else None

    def _sound(self, index: int) -> int:
        """The pair itself, or the next one that is not known to be corrupt."""
        if index not in self._corrupt:
            return index
        count = len(self.dataset)
        # Bounded, whatever other threads find corrupt meanwhile.
        sound = next((i % count for i in range(index, index + count) if i % count not in self._corrupt), None)
        if sound is None:
            what = f"{self.dataset.folder}: every pair" if isinstance(self.dataset, PairDataset) else "every image"
            raise CorruptArtifactError(f"{what} is corrupt: make them again")
        return sound

    def _reject(self, index: int, error: CorruptArtifactError) -> None:
        if self.on_corrupt == "stop":
            option = getattr(self.dataset, "skip_option", "--pretrain.on-corrupt")
            raise CorruptArtifactError(f"{error}, or pass `{option} skip` to go on without") from error
        with self._lock:
            new = index not in self._corrupt
            self._corrupt.add(index)
        if new:
            warnings.warn(f"corrupt pair {index} skipped and replaced by the next one: {error}", stacklevel=2)
