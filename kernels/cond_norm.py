"""Triton kernels of relu(scale x + shift), with a scale and a shift per sample and channel, and of its gradient.

Forward each program writes a run of the result, NCHW or NHWC, upsampled or not. Backward a program takes some channels
of some pixels of a sample, and stores partial sums of the gradients of scale and shift, which are added in one order.
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

__all__ = ["cond_norm", "cond_norm_backward"]

BLOCK = 1024
WARPS = 4
# Backward: values a step, and steps of a program, so that there are few partial sums.
TILE = 1024
STEPS = 8
# Channels of a tile in NHWC, pixels of one in NCHW.
BESIDE = 64


@triton.jit
def cond_norm_kernel(
    x, scale, apart, shift, shift_apart, y, chunks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, UPSAMPLE: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of a sample of y, which may be x."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    i = (tl.program_id(0) % chunks).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    FOUR: tl.constexpr = 4 if UPSAMPLE else 1
    exists = i < FOUR * C * H * W
    c = i % C if LAST else i // (FOUR * H * W)
    source = i
    if UPSAMPLE:
        pixel = i // C if LAST else i % (4 * H * W)
        small = pixel // (2 * W) // 2 * W + pixel % (2 * W) // 2
        source = small * C + c if LAST else c * (H * W) + small
    value = tl.load(x + n * (C * H * W) + source, exists, 0.0).to(COMPUTE)
    value = value * tl.load(scale + n * apart + c, exists, 0.0) + tl.load(shift + n * shift_apart + c, exists, 0.0)
    # A comparison, as a maximum may drop NaN.
    tl.store(y + n * (FOUR * C * H * W) + i, tl.where(value <= 0, 0.0, value), exists)


@triton.jit
def _given(grad, pixel, c, exists, C, H, W, UPSAMPLE: tl.constexpr, LAST: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum over the upsampled copies of the gradient of pixels [P] of channels [C'], a tile."""
    if not UPSAMPLE:
        return tl.load(grad + (pixel * C + c if LAST else c * (H * W) + pixel), exists, 0.0).to(COMPUTE)
    first = pixel // W * (4 * W) + pixel % W * 2
    at = grad + (first * C + c if LAST else c * (4 * H * W) + first)
    right = C if LAST else 1
    below = 2 * W * right
    top = tl.load(at, exists, 0.0).to(COMPUTE) + tl.load(at + right, exists, 0.0).to(COMPUTE)
    return top + (tl.load(at + below, exists, 0.0).to(COMPUTE) + tl.load(at + below + right, exists, 0.0).to(COMPUTE))


@triton.jit
def cond_norm_backward_kernel(
    grad, x, scale, apart, shift, shift_apart, grad_x, sums, parts, steps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, UPSAMPLE: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of `steps` x PIXELS pixels of CHANNELS channels, and partial sums [2, N, parts, C]."""
    groups: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups % parts
    n = (tl.program_id(0) // groups // parts).to(tl.int64)
    c = group.to(OFFSET) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    a = tl.load(scale + n * apart + c, c < C, 0.0)
    b = tl.load(shift + n * shift_apart + c, c < C, 0.0)
    of_scale = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    of_shift = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    FOUR: tl.constexpr = 4 if UPSAMPLE else 1
    start = n * (C * H * W)
    for step in range(steps):
        pixel = (part * steps + step).to(OFFSET) * PIXELS + tl.arange(0, PIXELS)[:, None]
        exists = (pixel < H * W) & (c < C)
        at = pixel * C + c if LAST else c * (H * W) + pixel
        value = tl.load(x + start + at, exists, 0.0).to(COMPUTE)
        given = _given(grad + start * FOUR, pixel, c, exists, C, H, W, UPSAMPLE, LAST, COMPUTE)
        given = tl.where(value * a + b <= 0, 0.0, given)
        tl.store(grad_x + start + at, given * a, exists)
        of_scale += given * value
        of_shift += given
    if sums is not None:
        place = sums + (n * parts + part) * C + c
        tl.store(place, tl.sum(of_scale, 0, keep_dims=True), c < C)
        samples = tl.num_programs(0) // (groups * parts)
        tl.store(place + samples.to(tl.int64) * parts * C, tl.sum(of_shift, 0, keep_dims=True), c < C)


def cond_norm(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool, y: Tensor) -> None:
    """Fill `y` from dense x [N, C, H, W] of the same layout; scales and shifts [N, C], rows any distance apart.

    y may be x itself where nothing is upsampled.
    """
    apart = scale.stride(0), shift.stride(0)
    launch, chunks = _forward_of(Layout.of(x), Layout.of(y), scale.dtype, apart, upsample)
    with on_device(x):
        launch(x, scale, apart[0], shift, apart[1], y, chunks)


@lru_cache(PLANS)
def _forward_of(
    x: Layout, y: Layout, computed: torch.dtype, apart: tuple[int, int], upsample: bool
) -> tuple[Launch, int]:
    """The launch for images of these sizes and rows so far apart, and programs a sample.

    16 bytes of scales and shifts are loaded at once only where Triton knows that distances are multiples of 16.
    """
    n, *sizes = y.shape
    chunks = triton.cdiv(math.prod(sizes), BLOCK)
    meta = _meta(x, y, computed, upsample) | {"BLOCK": BLOCK, "num_warps": WARPS}
    return Launch(cond_norm_kernel, (n * chunks,), specialized=True, **meta), chunks


def cond_norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    upsample: bool,
    grad_x: Tensor,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    """Fill the gradients of x [N, C, H, W] and, unless None, of scale and shift [N, C] from that of the result."""
    with_sums = grad_scale is not None
    apart = scale.stride(0), shift.stride(0)
    launch, steps, of_sums = _backward_of(Layout.of(x), Layout.of(grad), scale.dtype, apart, upsample, with_sums)
    sums = scale.new_empty(of_sums) if with_sums else None
    with on_device(x):
        launch(grad, x, scale, apart[0], shift, apart[1], grad_x, sums, of_sums[2], steps)
    if with_sums:
        torch.sum(sums[0], 1, out=grad_scale)
        torch.sum(sums[1], 1, out=grad_shift)


@lru_cache(PLANS)
def _backward_of(
    x: Layout, grad: Layout, computed: torch.dtype, apart: tuple[int, int], upsample: bool, with_sums: bool
) -> tuple[Launch, int, tuple[int, ...]]:
    """The launch for images of these sizes, steps of a program, and the shape of the partial sums, if there are any."""
    n, channels, height, width = x.shape
    meta = _meta(x, grad, computed, upsample)
    beside = min(BESIDE, triton.next_power_of_2(channels if meta["LAST"] else height * width))
    across = min(TILE // beside, triton.next_power_of_2(height * width if meta["LAST"] else channels))
    pixels, group = (across, beside) if meta["LAST"] else (beside, across)
    steps = min(STEPS, triton.cdiv(height * width, pixels))
    parts = triton.cdiv(height * width, pixels * steps)
    grid = (n * parts * triton.cdiv(channels, group),)
    meta |= {"PIXELS": pixels, "CHANNELS": group, "num_warps": WARPS}
    launch = Launch(cond_norm_backward_kernel, grid, specialized=True, **meta)
    return launch, steps, (2, n, parts, channels)


def _meta(x: Layout, y: Layout, computed: torch.dtype, upsample: bool) -> dict[str, Any]:
    _, channels, height, width = x.shape
    compute = tl.float64 if computed == torch.float64 else tl.float32
    # y decides: x may be so small that both layouts fit it.
    layout = {
        "UPSAMPLE": upsample,
        "LAST": not y.contiguous,
        "OFFSET": offsets(math.prod(y.shape[1:])),
        "COMPUTE": compute,
    }
    return {"C": channels, "H": height, "W": width, **layout}


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's: half NHWC, or all of float32, NCHW, float64 and upsampled."""
    chosen = [(torch.float16 if thorough else torch.bfloat16, torch.channels_last, False)]
    if thorough:
        chosen += [(torch.float32, torch.channels_last, True), (torch.float32, torch.contiguous_format, False)]
        chosen += [(torch.float16, torch.contiguous_format, True), (torch.float64, torch.channels_last, False)]
    for dtype, layout, upsample in chosen:
        size = (128, 128) if upsample else (64, 64)
        x = torch.empty(8, 192, 64, 64, dtype=dtype, device=device, memory_format=layout)
        y = torch.empty(8, 192, *size, dtype=dtype, device=device, memory_format=layout)
        affine = torch.empty(8, 192, dtype=torch.promote_types(dtype, torch.float32), device=device)
        name = " ".join(
            [str(dtype).removeprefix("torch."), "NHWC" if layout == torch.channels_last else "NCHW"]
            + ["upsampled"] * upsample
        )
        yield name, partial(cond_norm, x, affine, affine, upsample, y)
        yield f"{name} backward", partial(cond_norm_backward, y, x, affine, affine, upsample, x, affine, affine)
