"""Batches of images that are decoded in threads as they are needed, so that a data set need not fit memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from copgen_fast.images.split import Fault, Split, UnreadableImageError
from copgen_fast.images.views import View
from copgen_fast.runtime import threads

_AHEAD = 2  # batches that are being decoded while a GPU uses one
_AT_ONCE = 16  # most images that a thread takes


class ImageBatch(NamedTuple):
    """Images uint8 [B, 3, S, S], their labels and indices int64 [B], and what could not be decoded of the batch.

    Of `Several` views, images are [B, 3 K, S, S].
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    faults: list[Fault]


def stream(split: Split, view: View, order: Iterable[Tensor], workers: int | None = None) -> Iterator[ImageBatch]:
    """Batches of a split's images, in order; memory holds three of them, without a GPU one.

    What uses a batch on the CPU takes all processors: were others decoded meanwhile, its threads would wait for each
    other.

    Args:
        view: what is taken of each image.
        order: indices of the images of each batch, int64 [B]; those that can't be decoded are left out of it.
        workers: threads that decode, which Pillow lets run side by side; None: as many as there are processors, or one
            where the split's images are `small`. PyTorch's operators run in these alone.
    """
    batches = iter(order)
    workers = workers or (1 if getattr(split, "small", False) else os.cpu_count() or 1)
    ahead = _AHEAD if torch.cuda.is_available() else 0
    with ThreadPoolExecutor(workers, initializer=threads.alone) as pool:
        pending: deque[list[Future[_Part]]] = deque()
        try:
            while True:
                while len(pending) <= ahead and (indices := next(batches, None)) is not None:
                    size = max(1, min(_AT_ONCE, -(-len(indices) // workers)))
                    pending.append([pool.submit(_read, split, view, part.tolist()) for part in indices.split(size)])
                if not pending:
                    return
                yield _joined(view, [part.result() for part in pending.popleft()])
        finally:
            for part in chain.from_iterable(pending):
                part.cancel()


def in_order(count: int, batch: int) -> Iterator[Tensor]:
    """Indices 0 .. count - 1, in batches; the last one may be smaller."""
    return iter(torch.arange(count).split(batch))


def shuffled(count: int, batch: int, generator: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """A permutation of 0 .. count - 1, in batches.

    Args:
        drop_last: leave out the last ones that don't fill a batch.
    """
    batches = torch.randperm(count, generator=generator).split(batch)
    return iter(batches[: count // batch] if drop_last else batches)


class _Part(NamedTuple):
    """Images, labels and indices of those that could be decoded, and what is wrong with the others."""

    images: list[Tensor]
    labels: list[int]
    indices: list[int]
    faults: list[Fault]


def _read(split: Split, view: View, indices: list[int]) -> _Part:
    part = _Part([], [], [], [])
    for index in indices:
        try:
            image, label = split.read(index, view)
        except UnreadableImageError as error:
            part.faults.append(error.fault)
        else:
            # Lists, as each operator of PyTorch's lets another thread in, which takes its time.
            part.images.append(image)
            part.labels.append(label)
            part.indices.append(index)
    return part


def _joined(view: View, parts: Iterable[_Part]) -> ImageBatch:
    images, labels, indices, faults = (list(chain.from_iterable(column)) for column in zip(*parts, strict=True))
    joined = torch.stack(images) if images else torch.empty(0, 3, view.size, view.size, dtype=torch.uint8)
    return ImageBatch(joined, torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64), faults)
