"""Loading of pairs and packed images through NVIDIA DALI: its threads decode on the CPU, or the GPU decodes JPEG.

DALI gets encoded images from our reader, in our sampler's order, instead of reading shards itself. Its
`readers.webdataset` was tried (2.4.0, with index files of wds2idx). Its counts and resumes are exact; but its order
depends on a buffer of `initial_fill` samples and on internal state, not on (seed, epoch, step), so no other loader can
reproduce it; without padding a batch straddles epochs, after which pairs come twice in an epoch; and ranks read
contiguous ranges, not rows of the same batches. Here both loaders share one sampler, and there are no index files.
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
from copgen_fast.images.real_pairs import PackedPairs
from copgen_fast.pairs.read.batch import Batches, PairBatch, as_batch
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.read.prefetch import Prefetcher
from copgen_fast.pairs.read.reader import Shards
from copgen_fast.pairs.read.sampler import Sampler
from copgen_fast.runtime.devices import send

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

_CPU = torch.device("cpu")
# Batches in DALI's pipeline at a time, and encoded ones prefetched for it.
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
    """An input batch of DALI's pipeline, which does not copy the files: they must live until its output is copied."""

    step: int
    files: list[np.ndarray]
    """uint8 [bytes] each, anchors first."""
    indices: np.ndarray
    """int64 [(1 + K) B, 1]."""
    corners: np.ndarray
    """int32 [(1 + K) B, 2]: top and left of the part of each image that is taken."""
    labels: Tensor


class DaliBatches(Batches):
    """The batches of `loader.PairBatches`: bit for bit, but for the rounding of a GPU's JPEG decoder.

    Args:
        workers: threads of DALI that decode, at least one; 0 also turns prefetching off.
        on_corrupt: see `Reader`. Pillow decides whether an image that DALI can't decode is corrupt.
        device: where batches are returned; a GPU decodes (DALI's `mixed`).

    Attributes:
        steps_per_epoch: batches in an epoch.

    Raises:
        UsageError: DALI is not installed.
    """

    def __init__(
        self,
        dataset: PairDataset | PackedPairs,
        sampler: Sampler,
        workers: int = 2,
        on_corrupt: OnCorrupt = "stop",
        device: torch.device = _CPU,
    ) -> None:
        require()
        super().__init__(dataset, sampler, on_corrupt, device)
        self._threads, self._views = max(1, workers), dataset.views
        self._encoded = Prefetcher(self._plan, _DEPTH if workers else 0, sampler.steps)
        self._pipeline: Pipeline | None = None
        self._in_flight: deque[_Encoded] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _load(self, step: int) -> tuple[list[int], PairBatch]:
        """Raises CopgenError where DALI failed at images that Pillow decodes."""
        if not self._in_flight or self._in_flight[0].step != step:
            self._close()
        try:
            if self._pipeline is None:
                self._open(step)
            return self._take()
        except BaseException:
            self._close()
            raise

    def _plan(self, step: int) -> Callable[[], _Encoded]:
        indices, shards, first_read = self.sampler.indices(step), self._load_shards(step), self._first_read(step)
        return lambda: self._read(step, indices, shards, first_read)

    def _read(self, step: int, indices: list[int], shards: Shards, first_read: list[int]) -> _Encoded:
        for number in first_read:
            self.dataset.checks.compare(number)
        items = [self._reader.encoded(index, shards) for index in indices]
        files = [file for view in zip(*(item.images for item in items), strict=True) for file in view]
        return _Encoded(
            step,
            [np.frombuffer(file, np.uint8) for file in files],
            np.array(indices * self._views, np.int64)[:, None],
            np.array([item.corner for item in items] * self._views, np.int32),
            torch.tensor([item.label for item in items]),
        )

    def _open(self, step: int) -> None:
        """Start a pipeline whose first output is the batch of `step`."""
        ready = [self._encoded(step)]
        with contextlib.suppress(Exception):  # raised when that step is requested
            ready += [self._encoded(later) for later in range(step + 1, step + _DEPTH) if self._has_step(later)]
        self._pipeline, self._in_flight = self._build(len(ready)), deque()
        self._pipeline.in_flight = self._in_flight  # the files must outlive the threads that read them
        for encoded in ready:
            self._feed(encoded)
        self._pipeline.schedule_run()  # the first call starts as many runs as the pipeline is deep

    def _feed(self, encoded: _Encoded) -> None:
        self._pipeline.feed_input("files", encoded.files)
        self._pipeline.feed_input("indices", encoded.indices)
        if self._cropped:
            self._pipeline.feed_input("corners", encoded.corners)
        self._in_flight.append(encoded)

    def _has_step(self, step: int) -> bool:
        return self.sampler.steps is None or step < self.sampler.steps

    def _close(self) -> None:
        self._pipeline, self._in_flight = None, deque()

    def _take(self) -> tuple[list[int], PairBatch]:
        """Pairs and batch of the first step in flight; the next step is fed."""
        first = self._in_flight[0]
        try:
            images, indices = self._pipeline.share_outputs()
            if any(tuple(shape) != self._shape for shape in images.shape()):
                raise RuntimeError("images of another size than in the index")
        except RuntimeError as error:
            self._close()
            return first.indices[: len(first.labels), 0].tolist(), self._decode_by_pillow(first, error)
        batch = self._copy(images, first.labels)
        taken = np.asarray(indices.as_array())[:, 0].tolist()
        self._pipeline.release_outputs()
        following = self._in_flight[-1].step + 1
        self._in_flight.popleft()
        if self._has_step(following):
            with contextlib.suppress(Exception):  # raised when that step is requested
                self._feed(self._encoded(following))
                self._pipeline.schedule_run()
        return taken[: self.sampler.rows], batch

    @property
    def _cropped(self) -> bool:
        """Whether images are larger than what is taken of them."""
        return isinstance(self.dataset, PackedPairs) and self.dataset.codec != "raw"

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.dataset.image_shape
        return height, width, channels

    def _copy(self, images: object, labels: Tensor) -> PairBatch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        shape = (self._views, len(labels), *self._shape)
        if self._stream is None:
            out = torch.empty(shape, dtype=torch.uint8)
            feed_ndarray(images.as_tensor(), out.view(-1, *self._shape))
        else:
            # On a separate stream, to wait for this copy alone, after which DALI may reuse its memory, and not for the
            # training step before it.
            with torch.cuda.stream(self._stream):
                out = torch.empty(shape, dtype=torch.uint8, device=self.device)
                feed_ndarray(images.as_tensor(), out.view(-1, *self._shape), cuda_stream=self._stream)
            self._stream.synchronize()
            out.record_stream(torch.cuda.current_stream(self.device))
        return as_batch(out.permute(0, 1, 4, 2, 3), send(labels, self.device))

    def _decode_by_pillow(self, encoded: _Encoded, error: RuntimeError) -> PairBatch:
        """The batch that DALI failed at, corrupt pairs replaced.

        Raises:
            CorruptArtifactError: there are some, and `on_corrupt` is stop.
            CopgenError: Pillow decodes all of it.
        """
        before = len(self.skipped)
        pairs = [self._reader.pair(index, {}) for index in encoded.indices[: len(encoded.labels), 0].tolist()]
        if len(self.skipped) == before:
            reason = " ".join(str(error).split())
            raise CopgenError(
                f"DALI failed at images that Pillow decodes: use `--pretrain.loader plain` ({reason})"
            ) from error
        anchors, positives, labels = zip(*pairs, strict=True)
        positives = torch.stack(positives).view(len(anchors), -1, *anchors[0].shape)
        views = (torch.stack(anchors), *positives.unbind(1))[: self._views]
        images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        batch = as_batch(images.unflatten(0, (self._views, -1)), torch.tensor(labels))
        return PairBatch(*(send(tensor, self.device) for tensor in batch))

    def _build(self, depth: int) -> Pipeline:
        """A pipeline from files, uint8 [bytes], and indices to images [H, W, 3] and the same indices.

        Packed images are cropped, by integers that the view computes; DALI's own resizing would give other bits.
        """
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        device_id = self._stream.device_index if on_gpu else None
        pipeline = Pipeline(self._views * self.sampler.rows, self._threads, device_id, prefetch_queue_depth=depth)
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
            indices = fn.external_source(name="indices", dtype=types.INT64, ndim=1)
            if self.dataset.codec == "raw":
                images = fn.reshape(files.gpu() if on_gpu else files, shape=list(self._shape))
            else:
                images = fn.decoders.image(files, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            if self._cropped:
                corners = fn.external_source(name="corners", dtype=types.INT32, ndim=1)
                images = fn.slice(images, start=corners, shape=self._shape[:2], axes=(0, 1))
            pipeline.set_outputs(images, indices)
        pipeline.build()
        return pipeline
