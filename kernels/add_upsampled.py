"""Triton kernels that add a tensor, upsampled by nearest 2 x, and a bias to another, and sum gradients by 2 x 2 pixels.

Each program takes a run of the small tensor, whose values it reads or writes once, and four values of the large one for
each, NCHW or NHWC: 16 bytes at a time in NHWC, where the number of channels allows.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.launch import PLANS, Launch, Layout, offsets, on_device
from torch import Tensor

__all__ = ["add_upsampled", "sum_by_four"]

BLOCK = 1024
WARPS = 4


@triton.jit
def _run_of(chunks, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, its BLOCK values of a dense small sample, and which of them exist."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    i = (tl.program_id(0) % chunks).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    return n, i, i < C * H * W


@triton.jit
def _pixels(i, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """Channel, row and column of values i of a dense small sample, and the first of their four places in a large."""
    c = i % C if LAST else i // (H * W)
    pixel = i // C if LAST else i % (H * W)
    row = pixel // W
    column = pixel % W
    first = row * (4 * W) + column * 2
    return c, row, column, first * C + c if LAST else c * (4 * H * W) + first


@triton.jit
def add_upsampled_kernel(
    x, small, apart, beside, below_small, right_small, bias, y, chunks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Four times BLOCK values of a sample of y, which may be x, from BLOCK of small, whose strides are given."""
    n, i, exists = _run_of(chunks, C, H, W, OFFSET, BLOCK)
    c, row, column, first = _pixels(i, C, H, W, LAST)
    source = row * below_small + column * right_small + c * beside
    value = tl.load(small + n * apart + source, exists, 0.0).to(COMPUTE)
    if bias is not None:
        value += tl.load(bias + c, exists, 0.0).to(COMPUTE)
    right: tl.constexpr = C if LAST else 1
    below: tl.constexpr = 2 * W * right
    start = n * (4 * C * H * W)
    at = x + start + first
    a = tl.load(at, exists, 0.0).to(COMPUTE)
    b = tl.load(at + right, exists, 0.0).to(COMPUTE)
    d = tl.load(at + below, exists, 0.0).to(COMPUTE)
    e = tl.load(at + below + right, exists, 0.0).to(COMPUTE)
    to = y + start + first
    tl.store(to, a + value, exists)
    tl.store(to + right, b + value, exists)
    tl.store(to + below, d + value, exists)
    tl.store(to + below + right, e + value, exists)


@triton.jit
def sum_by_four_kernel(
    grad, grad_small, chunks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of a sample of grad_small, each the sum of 2 x 2 pixels of grad."""
    n, i, exists = _run_of(chunks, C, H, W, OFFSET, BLOCK)
    _, _, _, first = _pixels(i, C, H, W, LAST)
    right: tl.constexpr = C if LAST else 1
    below: tl.constexpr = 2 * W * right
    at = grad + n * (4 * C * H * W) + first
    top = tl.load(at, exists, 0.0).to(COMPUTE) + tl.load(at + right, exists, 0.0).to(COMPUTE)
    bottom = tl.load(at + below, exists, 0.0).to(COMPUTE) + tl.load(at + below + right, exists, 0.0).to(COMPUTE)
    tl.store(grad_small + n * (C * H * W) + i, top + bottom, exists)


def add_upsampled(x: Tensor, small: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill `y`, which may be x, from dense x [N, C, 2H, 2W] of the same layout, any small [N, C, H, W] and bias [C]."""
    bias = None if bias is None else bias.contiguous()
    types = (x.dtype, small.dtype, None if bias is None else bias.dtype)
    launch, chunks = _launch(add_upsampled_kernel, Layout.of(y), small.stride(), *types)
    with on_device(x):
        launch(x, small, *small.stride(), bias, y, chunks)


def sum_by_four(grad: Tensor, grad_small: Tensor) -> None:
    """Fill dense `grad_small` [N, C, H, W] with the sums of 2 x 2 pixels of dense grad of the same layout."""
    launch, chunks = _launch(sum_by_four_kernel, Layout.of(grad), grad_small.stride(), grad_small.dtype)
    with on_device(grad):
        launch(grad, grad_small, chunks)


@lru_cache(PLANS)
def _launch(kernel: Any, large: Layout, strides: tuple[int, ...], *_: Any) -> tuple[Launch, int]:
    """The launch on dense large [N, C, 2H, 2W], small of these strides, and these other types; chunks of a sample."""
    n, *sample = large.shape
    channels, height, width = small = (sample[0], sample[1] // 2, sample[2] // 2)
    chunks = triton.cdiv(math.prod(small), BLOCK)
    apart = sum((size - 1) * stride for size, stride in zip(small, strides[1:], strict=True))
    types = {
        "OFFSET": offsets(math.prod(sample), apart),
        "COMPUTE": tl.float64 if large.dtype == torch.float64 else tl.float32,
    }
    sizes = {"C": channels, "H": height, "W": width, "LAST": not large.contiguous}
    constants = sizes | types | {"BLOCK": BLOCK, "num_warps": WARPS}
    return Launch(kernel, (n * chunks,), specialized=True, **constants), chunks


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's: half NHWC, or all of float32, NCHW and float64."""
    chosen = [(torch.float16 if thorough else torch.bfloat16, torch.channels_last)]
    if thorough:
        chosen += [(torch.float32, torch.channels_last), (torch.float16, torch.contiguous_format)]
        chosen += [(torch.float64, torch.channels_last)]
    for dtype, layout in chosen:
        x, small = (
            torch.empty(8, 96, side, side, dtype=dtype, device=device, memory_format=layout) for side in (64, 32)
        )
        bias = torch.empty(96, dtype=dtype, device=device)
        name = f"{str(dtype).removeprefix('torch.')} {'NHWC' if layout == torch.channels_last else 'NCHW'}"
        yield name, partial(add_upsampled, x, small, bias, x)
        yield f"{name} backward", partial(sum_by_four, x, small)
