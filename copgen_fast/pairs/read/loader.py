"""Loading of pairs in plain PyTorch: threads read and decode ahead of the step, or decoded pairs are cached.

Threads rather than processes: Pillow decodes outside the interpreter's lock, and batches are filled where they are
used (page-locked memory on the way to a GPU) instead of passing through shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.config import OnCorrupt, PretrainConfig
from copgen_fast.errors import UsageError
from copgen_fast.images.real_pairs import PackedPairs
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.pairs.online import OnlineBatches, OnlinePairs
from copgen_fast.pairs.read.batch import NO_LABEL, Batches, PairBatch, Ready, as_batch
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.read.prefetch import Prefetcher
from copgen_fast.pairs.read.reader import Shards
from copgen_fast.pairs.read.sampler import Sampler

__all__ = ["NO_LABEL", "Batches", "PairBatch", "PairBatches", "PairDataset", "Sampler", "open_batches"]

_CPU = torch.device("cpu")
# Batches prefetched beyond the requested one: one decodes while the one before it waits for its last images.
_PREFETCHED = 2


def open_batches(
    dataset: Dataset,
    options: PretrainConfig,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
) -> Batches:
    """The loader that `options` choose, or what generates `OnlinePairs`; all return the same batches, on `device`.

    `auto` is DALI where it is installed, the device is a GPU and the decoded pairs don't fit the cache. Otherwise small
    images are read by one thread on the way to a GPU, and on a CPU by the step itself, as a thread beside it makes its
    operators wait.

    Args:
        rank, world: this process loads its rows of each batch of `options.batch` pairs (see `Sampler`).
        epochs: after which nothing more is prefetched; None: unknown.

    Raises:
        UsageError: DALI is chosen, and missing or can't read these data, or the data don't form such batches.
    """
    shard_size = dataset.index.shard_size if isinstance(dataset, PairDataset) else None
    steps = None if epochs is None else epochs * (len(dataset) // options.batch)
    sampler = Sampler(len(dataset), options.batch, seed, rank, world, shard_size, options.shuffle_shards, steps)
    if isinstance(dataset, OnlinePairs):
        return OnlineBatches(dataset, sampler, device, prefetched=options.workers > 0)
    wanted = options.loader == "dali"
    if wanted:
        expect_for_dali(dataset)
    if options.loader == "auto" and device.type == "cuda" and fault_for_dali(dataset) is None:
        from copgen_fast.pairs.read import dali

        wanted = dali.available() and dataset.decoded_bytes > options.cache_gib * 2**30
    if not wanted:
        workers = options.workers
        if getattr(dataset, "small", False):
            workers = min(workers, int(device.type == "cuda"))
        return PairBatches(dataset, sampler, options.cache_gib, workers, options.on_corrupt, device)
    from copgen_fast.pairs.read.dali import DaliBatches

    return DaliBatches(dataset, sampler, options.workers, options.on_corrupt, device)


def expect_for_dali(dataset: Dataset) -> None:
    """Raises UsageError where DALI can't read a data set."""
    if fault := fault_for_dali(dataset):
        raise UsageError(f"--pretrain.loader dali: {fault}, or choose plain")


def fault_for_dali(dataset: Dataset) -> str | None:
    """Why DALI can't read a data set, and what to do; None: it can."""
    if isinstance(dataset, PackedPairs):
        packed, wanted = dataset.split.size, dataset.view.size
        if packed != wanted:  # all of them would be resized, in our threads, to keep the same bits
            return f"images packed at {packed} px would all be resized to {wanted}: pack them by --size {wanted}"
        return None
    if isinstance(dataset, PairDataset):
        return None
    return "these images are in no shards: pack them by `python -m copgen_fast.images.pack`"


class PairBatches(Batches):
    """Shuffled batches by global step, decoded by Pillow.

    Where all decoded pairs fit into `cache_gib`, each is decoded once and kept. torch's global random generator is not
    used.

    Args:
        dataset: returns (anchor, positive, label), images uint8 [3, H, W] of one size, or K positives [K, 3, H, W]:
            PairDataset, or real images. A positive that is the same tensor as its anchor is decoded and kept once; what
            is `in_memory` is not kept again.
        workers: threads that read and decode; 0: the calling thread does, without prefetching.
        on_corrupt: see `Reader`.
        device: where batches are returned; to a GPU they are copied ahead of the step, on a separate stream.

    Attributes:
        steps_per_epoch: batches in an epoch.
        cached: whether pairs are kept in memory.

    Raises:
        TypeError, ValueError: images of another dtype or shape.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        cache_gib: float = 0.0,
        workers: int = 2,
        on_corrupt: OnCorrupt = "stop",
        device: torch.device = _CPU,
    ) -> None:
        super().__init__(dataset, sampler, on_corrupt, device)
        anchor, positive, _ = self._reader.pair(0, {})
        expect_tensor("anchor", anchor, (3, "H", "W"), [torch.uint8])
        several = ("K",) if isinstance(positive, Tensor) and positive.ndim == 4 else ()
        expect_tensor("positive", positive, (*several, *anchor.shape), [torch.uint8])
        self._views = 1 + (len(positive) if several else positive is not anchor)
        self._shape = (*anchor.shape[1:], 3)
        fits = self._views * anchor.nbytes * len(dataset) <= cache_gib * 2**30
        self.cached = fits and not getattr(dataset, "in_memory", False)
        self._cache = _Cache(self._views, len(dataset), self._shape) if self.cached else None
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._workers = workers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prefetcher = Prefetcher(self._plan, _PREFETCHED if workers else 0, sampler.steps)

    def _load(self, step: int) -> tuple[list[int], PairBatch]:
        return self._prefetcher(step).on_current_stream(self.device)

    def _plan(self, step: int) -> Callable[[], Ready]:
        indices = self.sampler.indices(step)
        shards = {} if self._cache and self._cache.full else self._load_shards(step)
        first_read = self._first_read(step)
        return lambda: self._make(indices, shards, first_read)

    def _make(self, indices: list[int], shards: Shards, first_read: list[int]) -> Ready:
        for number in first_read:
            self.dataset.checks.compare(number)
        on_gpu = self._stream is not None
        images = torch.empty(self._views, len(indices), *self._shape, dtype=torch.uint8, pin_memory=on_gpu)
        labels = torch.empty(len(indices), dtype=torch.int64, pin_memory=on_gpu)

        def fill(rows: slice) -> None:
            self._fill(images[:, rows].numpy(), labels[rows].numpy(), indices[rows], shards)

        if self._pool is None:
            fill(slice(None))
        else:
            rows = -(-len(indices) // (4 * self._workers))
            chunks = [slice(start, start + rows) for start in range(0, len(indices), rows)]
            for _ in self._pool.map(fill, chunks):
                pass
        if self._stream is None:
            return Ready(indices, _batch(images, labels), None)
        with torch.cuda.stream(self._stream):
            there = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            return Ready(indices, _batch(*there), self._stream.record_event())

    def _fill(self, images: np.ndarray, labels: np.ndarray, indices: list[int], shards: Shards) -> None:
        """Write rows of a batch: images [V, N, H, W, 3], labels [N]."""
        cache = self._cache
        if cache is None:
            self._reader.fill(images, labels, indices, shards)
            return
        if new := [index for index in indices if not cache.known[index]]:
            decoded = np.empty((self._views, len(new), *self._shape), np.uint8), np.empty(len(new), np.int64)
            self._reader.fill(*decoded, new, shards)
            cache.images[:, new], cache.labels[new] = decoded
            cache.known[new] = True
        images[:], labels[:] = cache.images[:, indices], cache.labels[indices]


def _batch(images: Tensor, labels: Tensor) -> PairBatch:
    """A batch of images [V, B, H, W, 3], anchors first."""
    return as_batch(images.permute(0, 1, 4, 2, 3), labels)


class _Cache:
    """Decoded pairs by index."""

    def __init__(self, views: int, count: int, shape: tuple[int, int, int]) -> None:
        self.images = np.empty((views, count, *shape), np.uint8)
        self.labels = np.empty(count, np.int64)
        self.known = np.zeros(count, bool)

    @property
    def full(self) -> bool:
        return bool(self.known.all())
