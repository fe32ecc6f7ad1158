"""Buffers between generator and encoder: images are quantised on their device and copied to pinned memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copgen_fast.pairs.format import levels, magnitudes, require

MOST = 1.5
"""Largest magnitude of an image's values: [-1, 1], and some overshoot of generators that do not clamp."""


@dataclass(frozen=True)
class PinnedBatch:
    """A batch of pairs in a buffer, or on its way there.

    Attributes:
        first, count: its pairs.
        copied: recorded on the GPU behind the copy; None on the CPU.
    """

    buffer: int
    first: int
    count: int
    copied: torch.cuda.Event | None


class PinnedBuffers:
    """Host buffers for a batch of pairs each, page-locked for a GPU, with as many on the GPU.

    A buffer holds each image's largest magnitude, float32 [V, n], anchors first, then the pixels, uint8
    [V, n, H, W, 3], V = 1 + positives: a single asynchronous copy brings both. The first batch, for which
    they are allocated, is the largest.

    Attributes:
        image_shape: (3, H, W) of the first batch.
    """

    image_shape: tuple[int, int, int]

    def __init__(self, buffers: int, device: torch.device, positives: int = 1) -> None:
        self._device, self._free, self._rows = device, list(range(buffers)), 1 + positives
        self._made: Tensor | None = None
        self._host: Tensor | None = None

    def put(self, anchors: Tensor, *positives: Tensor, first: int) -> PinnedBatch:
        """Quantise images [n, 3, H, W] in [-1, 1] into a free buffer; on a GPU, without waiting for it."""
        on_gpu = self._device.type == "cuda"
        if self._host is None:
            self.image_shape = tuple(anchors.shape[1:])
            size = self._rows * len(anchors) * (math.prod(self.image_shape) + 4)
            shape = len(self._free), size + -size % 4  # numbers of 4 bytes start where memory is divisible by 4
            self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
            self._made = torch.empty(shape, dtype=torch.uint8, device=self._device) if on_gpu else self._host
        buffer, count = self._free.pop(0), len(anchors)
        pixels, largest = self._views(self._made, buffer, count)
        for row, images in enumerate((anchors, *positives)):
            pixels[row].copy_(levels(images).permute(0, 2, 3, 1))
            largest[row].copy_(magnitudes(images))
        copied = None
        if on_gpu:
            size = pixels.numel() + 4 * largest.numel()
            self._host[buffer, :size].copy_(self._made[buffer, :size], non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        return PinnedBatch(buffer, first, count, copied)

    def pixels(self, batch: PinnedBatch) -> np.ndarray:
        """Wait for a batch's copy alone, and return its pixels, uint8 [V, n, H, W, 3], valid until `free`.

        Raises:
            NonFiniteError: an image held a NaN or an infinity; the message names the pair.
            CopgenError: values of another scale than [-1, 1].
        """
        if batch.copied is not None:
            batch.copied.synchronize()
        pixels, largest = self._views(self._host, batch.buffer, batch.count)
        for row in range(self._rows):
            require(f"images of {'positives' if row else 'anchors'}", largest[row], batch.first, MOST)
        return pixels.numpy()

    def free(self, batch: PinnedBatch) -> None:
        """Let the batch's buffer be filled again."""
        self._free.append(batch.buffer)

    def _views(self, memory: Tensor, buffer: int, count: int) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [V, count, H, W, 3], and largest magnitudes, float32 [V, count], of a buffer."""
        rows, (channels, height, width) = self._rows, self.image_shape
        first = 4 * rows * count
        largest, pixels = memory[buffer].split([first, len(memory[buffer]) - first])
        pixels = pixels[: rows * count * channels * height * width].view(rows, count, height, width, channels)
        return pixels, largest.view(torch.float32).view(rows, count)
