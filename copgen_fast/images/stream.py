"""Batches of images that are decoded in threads as they are needed, so that a data set need not fit memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from copgen_fast.images.split import Fault, Split, UnreadableImageError
from copgen_fast.images.views import Several, View
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
        workers: threads that decode, which Pillow lets run side by side; None: as many as there are processors.
            PyTorch's operators run in these alone.
    """
    batches, workers = iter(order), workers or os.cpu_count() or 1
    ahead = _AHEAD if torch.cuda.is_available() else 0
    with ThreadPoolExecutor(workers, initializer=threads.alone) as pool:
        pending: deque[tuple[Tensor, list[Future]]] = deque()
        try:
            while True:
                while len(pending) <= ahead and (indices := next(batches, None)) is not None:
                    size = max(1, min(_AT_ONCE, -(-len(indices) // workers)))
                    parts = [pool.submit(_read, split, view, part) for part in indices.split(size)]
                    pending.append((indices, parts))
                if not pending:
                    return
                indices, parts = pending.popleft()
                yield _joined(indices, [part.result() for part in parts])
        finally:
            for _, parts in pending:
                for part in parts:
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


Part = tuple[Tensor, Tensor, list[int], list[Fault]]


def _read(split: Split, view: View, indices: Tensor) -> Part:
    """Images, labels and rows of those that can be decoded, and what is wrong with the others."""
    channels = 3 * len(view.views) if isinstance(view, Several) else 3
    images = torch.empty(len(indices), channels, view.size, view.size, dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.int64)
    rows, faults = [], []
    for row, index in enumerate(indices.tolist()):
        try:
            images[row], labels[row] = split.read(index, view)
            rows.append(row)
        except UnreadableImageError as error:
            faults.append(error.fault)
    return images, labels, rows, faults


def _joined(indices: Tensor, parts: list[Part]) -> ImageBatch:
    images, labels = (torch.cat([part[column] for part in parts]) for column in (0, 1))
    faults = [fault for part in parts for fault in part[3]]
    if faults:
        size = len(parts[0][0])
        rows = torch.tensor([size * number + row for number, part in enumerate(parts) for row in part[2]])
        images, labels, indices = images[rows.long()], labels[rows.long()], indices[rows.long()]
    return ImageBatch(images, labels, indices, faults)
