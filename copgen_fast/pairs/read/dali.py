"""Loads pairs through NVIDIA DALI: its threads decode on the CPU, or the GPU decodes JPEG.

DALI gets encoded images from our own reader, in our own order, instead of reading shards by itself. Its
`readers.webdataset` was tried (2.4.0, with index files of wds2idx). It counts exactly and its checkpoints resume
exactly, a second time too; but its order comes out of a buffer of `initial_fill` samples and a state of its own, not
out of (seed, epoch, step), so no other loader can follow it; without padding a batch straddles epochs, after which
pairs come twice in what is an epoch here; and ranks read contiguous parts, not shares of one process's batches. Here
order, sharding and resume are arithmetic, the same in both loaders, and there are no index files.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from copgen_fast.config import OnCorrupt
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.pairs.read.batch import PairBatch
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.read.prefetch import Prefetcher
from copgen_fast.pairs.read.reader import HeldShards, Reader
from copgen_fast.pairs.read.sampler import CoverageCheck, Sampler
from copgen_fast.runtime.devices import send

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

_CPU = torch.device("cpu")
# Batches that DALI works on at a time, beside the encoded ones that are read ahead of it.
_DEPTH = 2


def available() -> bool:
    """Whether DALI is installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def require() -> None:
    """Raises UsageError unless DALI is installed."""
    if not available():
        raise UsageError(
            "--pretrain.loader dali: DALI is not installed: `pip install 'copgen_fast[dali]'`, or choose plain"
        )


class _Encoded(NamedTuple):
    """A batch as it goes in: DALI reads the files where they are, so they must live until it comes out."""

    step: int
    files: list[np.ndarray]
    """uint8 [bytes] each, all anchors, then all positives."""
    indices: np.ndarray
    """int64 [2B, 1]."""
    labels: Tensor


class DaliBatches:
    """As `loader.PairBatches`, which gives the same batches: bit for bit, less what a GPU's JPEG decoder rounds.

    Args:
        workers: threads of DALI that decode, at least one.
        on_corrupt: see `Reader`. What DALI can't decode is decoded by Pillow, whose verdict counts.
        device: on the CPU everything runs there; else decoding is `mixed`, and batches are made on that GPU.

    Attributes:
        steps_per_epoch: batches in an epoch.

    Raises:
        UsageError: DALI is not installed.
    """

    def __init__(
        self,
        dataset: PairDataset,
        order: Sampler,
        workers: int = 2,
        on_corrupt: OnCorrupt = "stop",
        device: torch.device = _CPU,
    ) -> None:
        require()
        self.dataset, self.order, self.device, self._threads = dataset, order, device, max(1, workers)
        self.steps_per_epoch = order.steps_per_epoch
        self._reader, self._ledger = Reader(dataset, on_corrupt), CoverageCheck(order)
        self._encoded = Prefetcher(self._plan, _DEPTH if workers else 0, order.steps)
        self._pipeline: Pipeline | None = None
        self._inside: deque[_Encoded] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def skipped(self) -> list[int]:
        """Pairs found corrupt so far and replaced, sorted."""
        return self._reader.skipped

    def __call__(self, step: int) -> PairBatch:
        """The batch of a global step; 0 is the first of epoch 0.

        Raises:
            CorruptArtifactError: a pair can't be decoded, and `on_corrupt` is stop.
            CopgenError: DALI failed, or pairs did not come once each: a fault of this code.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        if not self._inside or self._inside[0].step != step:
            self._close()
        try:
            if self._pipeline is None:
                self._open(step)
            indices, batch = self._take()
        except BaseException:
            self._close()
            raise
        self._ledger.enter(step, indices)
        return batch

    def _plan(self, step: int) -> Callable[[], _Encoded]:
        indices = self.order.indices(step)
        shards = self._reader.hold(self.order.shards(step)) if self.order.window is not None else {}
        return lambda: self._read(step, indices, shards)

    def _read(self, step: int, indices: list[int], shards: HeldShards) -> _Encoded:
        pairs, labels = zip(*(self._reader.encoded(index, shards) for index in indices), strict=True)
        files = [*(pair.anchor for pair in pairs), *(pair.positive for pair in pairs)]
        return _Encoded(
            step,
            [np.frombuffer(file, np.uint8) for file in files],
            np.array(indices * 2, np.int64)[:, None],
            torch.tensor(labels),
        )

    def _open(self, step: int) -> None:
        """Start a pipeline whose first output is the batch of `step`."""
        ready = [self._encoded(step)]
        with contextlib.suppress(Exception):  # raised when that step is asked for
            ready += [self._encoded(step + ahead) for ahead in range(1, _DEPTH) if self._goes_on(step + ahead)]
        self._pipeline, self._inside = self._build(len(ready)), deque()
        self._pipeline.inside = self._inside  # the files must outlive the threads that read them
        for encoded in ready:
            self._feed(encoded)
        self._pipeline.schedule_run()  # the first call starts as many runs as the pipeline is deep

    def _feed(self, encoded: _Encoded) -> None:
        self._pipeline.feed_input("files", encoded.files)
        self._pipeline.feed_input("indices", encoded.indices)
        self._inside.append(encoded)

    def _goes_on(self, step: int) -> bool:
        return self.order.steps is None or step < self.order.steps

    def _close(self) -> None:
        self._pipeline, self._inside = None, deque()

    def _take(self) -> tuple[list[int], PairBatch]:
        """Pairs and batch of the first step inside, after which the next one goes in."""
        first = self._inside[0]
        try:
            images, indices = self._pipeline.share_outputs()
            if any(tuple(shape) != self._shape for shape in images.shape()):
                raise RuntimeError("images of another size than the index says")
        except RuntimeError as error:
            self._close()
            return first.indices[: len(first.labels), 0].tolist(), self._decode_by_pillow(first, error)
        batch = self._copy(images, first.labels)
        taken = np.asarray(indices.as_array())[:, 0].tolist()
        self._pipeline.release_outputs()
        following = self._inside[-1].step + 1
        self._inside.popleft()
        if self._goes_on(following):
            with contextlib.suppress(Exception):  # raised when that step is asked for
                self._feed(self._encoded(following))
                self._pipeline.schedule_run()
        return taken[: len(taken) // 2], batch

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.dataset.index.image_shape
        return height, width, channels

    def _copy(self, images: object, labels: Tensor) -> PairBatch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        shape = (2, len(labels), *self._shape)
        if self._stream is None:
            out = torch.empty(shape, dtype=torch.uint8)
            feed_ndarray(images.as_tensor(), out.view(-1, *self._shape))
        else:
            # On a stream of its own: what is waited for is this copy, after which DALI may have its memory back, and
            # not the training step before it.
            with torch.cuda.stream(self._stream):
                out = torch.empty(shape, dtype=torch.uint8, device=self.device)
                feed_ndarray(images.as_tensor(), out.view(-1, *self._shape), cuda_stream=self._stream)
            self._stream.synchronize()
            out.record_stream(torch.cuda.current_stream(self.device))
        return PairBatch(*out.permute(0, 1, 4, 2, 3), send(labels, self.device))

    def _decode_by_pillow(self, encoded: _Encoded, error: RuntimeError) -> PairBatch:
        """The batch that DALI failed at, corrupt pairs replaced.

        Raises:
            CorruptArtifactError: there are some, and `on_corrupt` is stop.
            CopgenError: Pillow decodes all of it: the fault is another one.
        """
        before = len(self.skipped)
        pairs = [self._reader.pair(index, {}) for index in encoded.indices[: len(encoded.labels), 0].tolist()]
        if len(self.skipped) == before:
            reason = " ".join(str(error).split())
            raise CopgenError(
                f"DALI failed where Pillow finds no fault: `--pretrain.loader plain` goes on ({reason})"
            ) from error
        anchors, positives, labels = zip(*pairs, strict=True)
        images = torch.stack([*anchors, *positives]).contiguous(memory_format=torch.channels_last)
        batch = PairBatch(*images.chunk(2), torch.tensor(labels))
        return PairBatch(*(send(tensor, self.device) for tensor in batch))

    def _build(self, depth: int) -> Pipeline:
        """Files, uint8 [bytes], and indices in; images [H, W, 3] and the indices out."""
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        device_id = self._stream.device_index if on_gpu else None
        pipeline = Pipeline(2 * self.order.rows, self._threads, device_id, prefetch_queue_depth=depth)
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
            indices = fn.external_source(name="indices", dtype=types.INT64, ndim=1)
            if self.dataset.index.codec == "raw":
                images = fn.reshape(files.gpu() if on_gpu else files, shape=list(self._shape))
            else:
                images = fn.decoders.image(files, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            pipeline.set_outputs(images, indices)
        pipeline.build()
        return pipeline
