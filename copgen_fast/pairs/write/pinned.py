"""Pixels on their way from where they are made to where they are encoded: quantised there, copied once a batch."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copgen_fast.pairs.format import finite, levels, refuse_non_finite


@dataclass(frozen=True)
class Staged:
    """A batch of which everything is in its slot, or on the way there.

    Attributes:
        first, count: its pairs.
        copied: happens on the device when it is there; None: it is.
    """

    slot: int
    first: int
    count: int
    copied: torch.cuda.Event | None


class Staging:
    """Slots of host memory for a batch of pairs each, and one of the device's for each where that is a GPU.

    A slot holds the pixels, uint8 [2, n, H, W, 3], anchors first, and behind them a byte for each image: whether all of
    it was finite. So one copy, which nobody waits for, brings both.

    Args:
        pairs: most in a batch.
        image_shape: (3, H, W).
        memory: file descriptor of memory for others to look into; it gets the size it needs. None: memory of our own.
    """

    def __init__(
        self, slots: int, pairs: int, image_shape: tuple[int, ...], device: torch.device, memory: int | None
    ) -> None:
        self._image_shape = image_shape
        self._stride = 2 * pairs * (int(np.prod(image_shape)) + 1)
        self._free = list(range(slots))
        self._on_gpu = device.type == "cuda"
        self._registered = False
        size = slots * self._stride
        if memory is None:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)
        else:
            os.ftruncate(memory, size)
            self._host = torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8)
            self._registered = self._on_gpu and _page_lock(self._host)
        self._device = torch.empty(size, dtype=torch.uint8, device=device) if self._on_gpu else self._host

    def put(self, anchors: Tensor, positives: Tensor, first: int) -> Staged:
        """Quantise images [n, 3, H, W] in [-1, 1] into a free slot; on a GPU, without waiting for them."""
        slot, count = self._free.pop(0), len(anchors)
        pixels, sound = self._parts(self._device, slot, count)
        for row, images in enumerate((anchors, positives)):
            pixels[row].copy_(levels(images).permute(0, 2, 3, 1))
            sound[row].copy_(finite(images))
        copied = None
        if self._on_gpu:
            begin, size = self.offset(slot), pixels.numel() + sound.numel()
            self._host[begin : begin + size].copy_(self._device[begin : begin + size], non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return Staged(slot, first, count, copied)

    def pixels(self, staged: Staged) -> np.ndarray:
        """Wait for a batch's copy alone, then hand out its slot, uint8 [2, n, H, W, 3], until it is freed.

        Raises:
            NonFiniteError: an image held a NaN or an infinity; the message names the pair.
        """
        if staged.copied is not None:
            staged.copied.synchronize()
        pixels, sound = self._parts(self._host, staged.slot, staged.count)
        for row, name in enumerate(("images of anchors", "images of positives")):
            refuse_non_finite(name, sound[row].bool(), staged.first)
        return pixels.numpy()

    def offset(self, slot: int) -> int:
        """Where a slot begins in the memory, in bytes."""
        return slot * self._stride

    def free(self, staged: Staged) -> None:
        self._free.append(staged.slot)

    def close(self) -> None:
        """Unlock the memory; no copy may be under way."""
        if self._registered:
            torch.cuda.synchronize(self._device.device)
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())
            self._registered = False

    def _parts(self, memory: Tensor, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Pixels uint8 [2, count, H, W, 3] and whether they are finite, uint8 [2, count], of a slot."""
        channels, height, width = self._image_shape
        begin, size = self.offset(slot), 2 * count * channels * height * width
        pixels = memory[begin : begin + size].view(2, count, height, width, channels)
        return pixels, memory[begin + size : begin + size + 2 * count].view(2, count)


def _page_lock(host: Tensor) -> bool:
    """Keep shared memory in place, so that a GPU copies into it while the host goes on; False where that fails."""
    failure = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if failure:
        with contextlib.suppress(RuntimeError):  # CUDA keeps the error for whoever launches next to raise
            torch.ones(1, device="cuda")
        warnings.warn(f"shared memory can't be page-locked (CUDA error {failure}): copies wait", stacklevel=2)
    return not failure
