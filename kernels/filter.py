"""Triton kernel of a separable filter with weights per sample, and of its adjoint: the augmentation's blur."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.launch import PLANS, Launch, on_device
from torch import Tensor

# Two pixels a thread share a division.
BLOCK = 256
WARPS = 4


@triton.jit(do_not_specialize=("taps", "height", "width", "chunk_count"))
def filter_kernel(
    images, weights, filtered, taps, height, width, chunk_count,
    VERTICAL: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One axis of contiguous [M, 3, h, w]; the border is reflected without repeating its last pixel.

    The adjoint is a gather too: pixel j contributed to the outputs j - k, and beyond a border to the mirrored ones.
    """
    plane = (tl.program_id(0) // chunk_count).to(tl.int64)
    count = height * width
    pixel = tl.program_id(0) % chunk_count * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < count
    row = pixel // width
    at = row if VERTICAL else pixel - row * width
    length = height if VERTICAL else width
    step = width if VERTICAL else 1
    source = images + plane * count + pixel
    total = tl.zeros((BLOCK,), images.dtype.element_ty)
    for tap in range(taps):
        k = tap - taps // 2
        weight = tl.load(weights + plane // 3 * taps + tap).to(total.dtype)
        if TRANSPOSED:
            i = at - k
            total += weight * tl.load(source + (i - at) * step, exists & (i >= 0) & (i < length), 0.0)
            i = -at - k
            total += weight * tl.load(source + (i - at) * step, exists & (i >= 0) & (at > 0), 0.0)
            i = 2 * (length - 1) - at - k
            total += weight * tl.load(source + (i - at) * step, exists & (i < length) & (at < length - 1), 0.0)
        else:
            i = tl.abs(at + k)
            i = length - 1 - tl.abs(length - 1 - i)
            total += weight * tl.load(source + (i - at) * step, exists, 0.0)
    tl.store(filtered + plane * count + pixel, total, exists)


def separable_filter(images: Tensor, weights: Tensor, transposed: bool, filtered: Tensor) -> None:
    """Fill `filtered` with contiguous [M, 3, h, w] filtered along both axes by weights [M, 2R + 1]; R < min(h, w).

    `transposed` applies the adjoint; the axes commute, so it takes them in the same order.
    """
    m, channels, height, width = images.shape
    chunks = -(-height * width // BLOCK)  # triton.cdiv takes 6 us on the host
    between = torch.empty_like(images)
    sizes = (weights.shape[1], height, width, chunks)
    weights = weights.contiguous()
    across, down = (_launch(m * channels * chunks, images.dtype, vertical, transposed) for vertical in (False, True))
    with on_device(images):
        across(images, weights, between, *sizes)
        down(between, weights, filtered, *sizes)


@lru_cache(PLANS)
def _launch(programs: int, dtype: torch.dtype, vertical: bool, transposed: bool) -> Launch:
    """The launch along one axis of images of this type."""
    constants = {"VERTICAL": vertical, "TRANSPOSED": transposed, "BLOCK": BLOCK, "num_warps": WARPS}
    return Launch(filter_kernel, (programs,), specialized=True, **constants)


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's, that compile the kernel and its adjoint."""
    images, weights = (torch.empty(shape, device=device) for shape in ((8, 3, 128, 128), (8, 13)))
    for transposed in (False, True):
        name = "float32 transposed" if transposed else "float32"
        yield name, partial(separable_filter, images, weights, transposed, images)
