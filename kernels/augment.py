"""Triton kernels of the fused augmentation: crop, resize, flip, colour jitter, gray, solarise and normalise.

A program makes BLOCK neighbouring pixels of one view, so that branches on its parameters are uniform, and an op that
a view does not have costs nothing.

Forward is two launches: a contrast blends with the mean luminance of its whole view, and programs of one launch cannot
wait for each other. The first computes partial sums of the means, and returns at once for views without a contrast.

Backward is three: the gradient of the contrast's mean, again over the whole view; the gradient of the resized pixels,
through the colours, which are computed again; and its gather into the images. There are no atomic additions.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.color import Drawn, apply_jitter, jitter_vjp, load_jitter, luminance, masked_grad, tie
from copgen_fast.kernels.filter import separable_filter
from copgen_fast.kernels.launch import on_device
from copgen_fast.kernels.resize import (
    Sizes,
    Strides,
    first_within,
    load_crop,
    pixels_of,
    plane_pointers,
    read_resized,
    triangle,
)
from torch import Tensor

__all__ = ["augment_backward", "augment_forward", "separable_filter"]

# Two pixels a thread share the reads of parameters and the divisions. On sm_75 forward takes 64 registers, which fill
# a multiprocessor; backward takes 80, three quarters. Without the limit the assembler tries 72 for it, and spills. The
# contrast's sums need a few more.
BLOCK = 256
WARPS = 4
REGISTERS = 80
CONTRAST_REGISTERS = 96
# Most partial sums of a view; kernels that need the sum add them up, in one order.
PARTS = tl.constexpr(64)

# Pixels are read one by one, so no size, stride or alignment is worth a compilation. Numbers are arguments of their
# own, as those of a tuple would be specialised all the same.
_ANY = ("images", "drawn", "views", "pivots", "grads", "grad_images")
_ANY += ("n", "m", "height", "width", "out_height", "out_width", "part_count", "chunk_count")
_ANY += ("s0", "s1", "s2", "s3", "t0", "t1", "t2", "t3")
_kernel = triton.jit(do_not_specialize=_ANY)


@_kernel
def pivot_parts_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width, part_count, chunk_count,
    parts,
    TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of the luminance that the contrast of each view blends with."""
    strides = Strides(s0, s1, s2, s3)
    sizes = Sizes(n, m, height, width, out_height, out_width, part_count, chunk_count)
    view = tl.program_id(0) // sizes.parts
    part = tl.program_id(0) % sizes.parts
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    if (jitter.contrast == 0) | ~(ordered & inside):
        return
    count = sizes.out_height * sizes.out_width
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(part * BLOCK, count, sizes.parts * BLOCK):
        row, column, exists = pixels_of(start, count, sizes.out_width, BLOCK)
        r, g, b, _ = read_resized(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
        r, g, b, _, _, _, _ = apply_jitter(r, g, b, jitter, 0.0, jitter.contrast_at)
        total += tl.where(exists, luminance(r, g, b), 0.0)
    tl.store(parts + tl.cast(view, tl.int64) * PARTS + part, tl.sum(total))


@_kernel
def forward_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width, part_count, chunk_count,
    parts, scale, shift, views, t0, t1, t2, t3, pivots,
    TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Views, and the pivots of their contrasts."""
    strides = Strides(s0, s1, s2, s3)
    view_strides = Strides(t0, t1, t2, t3)
    sizes = Sizes(n, m, height, width, out_height, out_width, part_count, chunk_count)
    view = tl.program_id(0) // sizes.chunks
    chunk = tl.program_id(0) % sizes.chunks
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    valid = ordered & inside
    count = sizes.out_height * sizes.out_width
    pivot = tl.zeros((), COMPUTE)
    if (jitter.contrast != 0) & valid:
        pivot = _total(parts, view, sizes.parts) / count
    if chunk == 0:
        tl.store(pivots + view, pivot)

    row, column, exists = pixels_of(chunk * BLOCK, count, sizes.out_width, BLOCK)
    red, green, blue, down, right = plane_pointers(views, view_strides, view, OFFSET)
    offset = row * down + column * right
    if not valid:
        nothing = tl.full((BLOCK,), float("nan"), COMPUTE)
        tl.store(red + offset, nothing, exists)
        tl.store(green + offset, nothing, exists)
        tl.store(blue + offset, nothing, exists)
        return
    r, g, b, _ = read_resized(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
    r, g, b, _, _, _, _ = apply_jitter(r, g, b, jitter, pivot, jitter.end)
    if tl.load(drawn.gray + view):
        r = luminance(r, g, b)
        g = r
        b = r
    threshold = tl.load(drawn.solarize + view).to(r.dtype) - tie(r)
    r = tl.where(r >= threshold, 1 - r, r)
    g = tl.where(g >= threshold, 1 - g, g)
    b = tl.where(b >= threshold, 1 - b, b)
    tl.store(red + offset, r * _precise(scale, 0, COMPUTE) + _precise(shift, 0, COMPUTE), exists)
    tl.store(green + offset, g * _precise(scale, 1, COMPUTE) + _precise(shift, 1, COMPUTE), exists)
    tl.store(blue + offset, b * _precise(scale, 2, COMPUTE) + _precise(shift, 2, COMPUTE), exists)


@_kernel
def contrast_parts_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width, part_count, chunk_count,
    parts, scale, grads, t0, t1, t2, t3, pivots,
    STRAIGHT: tl.constexpr, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradient of the contrast of each view."""
    strides = Strides(s0, s1, s2, s3)
    grad_strides = Strides(t0, t1, t2, t3)
    sizes = Sizes(n, m, height, width, out_height, out_width, part_count, chunk_count)
    view = tl.program_id(0) // sizes.parts
    part = tl.program_id(0) % sizes.parts
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    if (jitter.contrast == 0) | ~(ordered & inside):
        return
    count = sizes.out_height * sizes.out_width
    pivot = tl.load(pivots + view)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(part * BLOCK, count, sizes.parts * BLOCK):
        row, column, exists = pixels_of(start, count, sizes.out_width, BLOCK)
        r, g, b, _ = read_resized(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
        r, g, b, hue_r, hue_g, hue_b, kept = apply_jitter(r, g, b, jitter, pivot, jitter.end)
        gr, gg, gb = _finish_vjp(grads, grad_strides, view, row, column, exists, r, g, b, drawn, scale, OFFSET, COMPUTE)
        gr, gg, gb = jitter_vjp(gr, gg, gb, hue_r, hue_g, hue_b, kept, jitter, 0.0, jitter.contrast_at + 1, STRAIGHT)
        gr, gg, gb = masked_grad(gr, gg, gb, kept, jitter.contrast_at, STRAIGHT)
        total += gr + gg + gb
    tl.store(parts + tl.cast(view, tl.int64) * PARTS + part, tl.sum(total))


@_kernel
def resized_grad_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width, part_count, chunk_count,
    parts, scale, grads, t0, t1, t2, t3, pivots, resized_grads,
    STRAIGHT: tl.constexpr, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the resized pixels, divided by the sum of their weights; [M, 3, h, w]."""
    strides = Strides(s0, s1, s2, s3)
    grad_strides = Strides(t0, t1, t2, t3)
    sizes = Sizes(n, m, height, width, out_height, out_width, part_count, chunk_count)
    view = tl.program_id(0) // sizes.chunks
    chunk = tl.program_id(0) % sizes.chunks
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    if ~(ordered & inside):
        return
    count = sizes.out_height * sizes.out_width
    share = tl.zeros((), COMPUTE)
    if jitter.contrast != 0:
        share = jitter.contrast * _total(parts, view, sizes.parts) / count
    row, column, exists = pixels_of(chunk * BLOCK, count, sizes.out_width, BLOCK)
    r, g, b, norm = read_resized(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
    r, g, b, hue_r, hue_g, hue_b, kept = apply_jitter(r, g, b, jitter, tl.load(pivots + view), jitter.end)
    gr, gg, gb = _finish_vjp(grads, grad_strides, view, row, column, exists, r, g, b, drawn, scale, OFFSET, COMPUTE)
    gr, gg, gb = jitter_vjp(gr, gg, gb, hue_r, hue_g, hue_b, kept, jitter, share, 0, STRAIGHT)
    out = resized_grads + tl.cast(view, tl.int64) * (3 * count) + chunk * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, gr * norm, exists)
    tl.store(out + count, gg * norm, exists)
    tl.store(out + 2 * count, gb * norm, exists)


@_kernel
def gather_kernel(
    grad_images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width, part_count, chunk_count,
    resized_grads,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the images: each pixel sums the contributions of all views of its image, in one order."""
    strides = Strides(s0, s1, s2, s3)
    sizes = Sizes(n, m, height, width, out_height, out_width, part_count, chunk_count)
    image = tl.program_id(0) // sizes.chunks
    start = tl.program_id(0) % sizes.chunks * BLOCK
    row, column, exists = pixels_of(start, sizes.height * sizes.width, sizes.width, BLOCK)
    count = sizes.out_height * sizes.out_width
    gr = tl.zeros((BLOCK,), COMPUTE)
    gg = tl.zeros((BLOCK,), COMPUTE)
    gb = tl.zeros((BLOCK,), COMPUTE)
    for view in range(image, sizes.views, sizes.images):
        _, ordered = load_jitter(drawn, view, COMPUTE)
        crop, inside = load_crop(drawn, view, sizes)
        below = (start + BLOCK - 1) // sizes.width < crop.top
        above = start // sizes.width >= crop.top + crop.height
        if ordered & inside & ~(below | above):
            y = row - crop.top
            x = column - crop.left
            exists_here = (y >= 0) & (y < crop.height) & (x >= 0) & (x < crop.width)
            y = tl.where(exists_here, y, 0)
            x = tl.where(exists_here, x, 0)
            count_y = (2 * tl.maximum(crop.height, sizes.out_height) + crop.height - 1) // crop.height
            count_x = (2 * tl.maximum(crop.width, sizes.out_width) + crop.width - 1) // crop.width
            first_y = first_within(y, sizes.out_height, crop.height, count_y)
            first_x = first_within(x, sizes.out_width, crop.width, count_x)
            source = resized_grads + tl.cast(view, tl.int64) * (3 * count)
            for tap_y in range(count_y):
                i = first_y + tap_y
                weight_y = triangle(i, y, crop.height, sizes.out_height, COMPUTE)
                weight_y = tl.where(exists_here & (i >= 0) & (i < sizes.out_height), weight_y, 0.0)
                for tap_x in range(count_x):
                    j = first_x + tap_x
                    weight = weight_y * triangle(j, x, crop.width, sizes.out_width, COMPUTE)
                    touched = (weight > 0) & (j >= 0) & (j < sizes.out_width)
                    offset = i * sizes.out_width + tl.where(crop.flip, sizes.out_width - 1 - j, j)
                    gr += weight * tl.load(source + offset, touched, 0.0).to(COMPUTE)
                    gg += weight * tl.load(source + count + offset, touched, 0.0).to(COMPUTE)
                    gb += weight * tl.load(source + 2 * count + offset, touched, 0.0).to(COMPUTE)
    red, green, blue, down, right = plane_pointers(grad_images, strides, image, OFFSET)
    offset = row * down + column * right
    tl.store(red + offset, gr, exists)
    tl.store(green + offset, gg, exists)
    tl.store(blue + offset, gb, exists)


@triton.jit
def _total(parts, view, part_count):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + tl.cast(view, tl.int64) * PARTS + part, part < part_count, 0.0))


@triton.jit
def _precise(numbers, channel: tl.constexpr, COMPUTE: tl.constexpr):
    """One of three numbers, each given as a float32 and its rounding error."""
    number = tl.cast(numbers[channel], COMPUTE)
    if COMPUTE == tl.float64:
        number += tl.cast(numbers[channel + 3], COMPUTE)
    return number


@triton.jit
def _finish_vjp(
    grads, strides, view, row, column, exists, r, g, b, drawn, scale, OFFSET: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Gradient of the jitter's result r, g, b: through the scale, the solarise and the gray."""
    red, green, blue, down, right = plane_pointers(grads, strides, view, OFFSET)
    offset = row * down + column * right
    gr = tl.load(red + offset, exists, 0.0).to(COMPUTE) * _precise(scale, 0, COMPUTE)
    gg = tl.load(green + offset, exists, 0.0).to(COMPUTE) * _precise(scale, 1, COMPUTE)
    gb = tl.load(blue + offset, exists, 0.0).to(COMPUTE) * _precise(scale, 2, COMPUTE)
    gray = tl.load(drawn.gray + view)
    if gray:
        r = luminance(r, g, b)
        g = r
        b = r
    threshold = tl.load(drawn.solarize + view).to(r.dtype) - tie(r)
    gr = tl.where(r >= threshold, -gr, gr)
    gg = tl.where(g >= threshold, -gg, gg)
    gb = tl.where(b >= threshold, -gb, gb)
    if gray:
        total = gr + gg + gb
        gr = 0.2989 * total
        gg = 0.587 * total
        gb = 0.114 * total
    return gr, gg, gb


def augment_forward(
    images: Tensor,
    crop: Tensor,
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    jitter: Tensor,
    gray: Tensor,
    solarize: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    views: Tensor,
    pivot: Tensor,
) -> None:
    """Fill `views` [V N, 3, h, w] from `images` [N, 3, H, W], and `pivot` [V N]; see ops/augment/operator.py."""
    drawn = Drawn(*(x.contiguous() for x in (crop, flip, order, factors, jitter, gray, solarize)))
    sizes = _sizes(images, views)
    shared = (images, *images.stride(), drawn, *sizes, pivot.new_empty(len(views), PARTS.value))
    meta = _meta(images, views)
    scale, shift = _split([1 / s for s in std]), _split([-m / s for m, s in zip(mean, std, strict=True)])
    with on_device(images):
        pivot_parts_kernel[(len(views) * sizes.parts,)](*shared, **meta)
        forward_kernel[(len(views) * sizes.chunks,)](*shared, scale, shift, views, *views.stride(), pivot, **meta)


def augment_backward(
    grad: Tensor,
    images: Tensor,
    crop: Tensor,
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    jitter: Tensor,
    gray: Tensor,
    solarize: Tensor,
    pivot: Tensor,
    std: Sequence[float],
    straight_through: bool,
    grad_images: Tensor,
) -> None:
    """Fill `grad_images`, the gradient of `images`, from that of the views; see ops/augment/operator.py."""
    drawn = Drawn(*(x.contiguous() for x in (crop, flip, order, factors, jitter, gray, solarize)))
    sizes = _sizes(images, grad)
    parts = pivot.new_empty(len(grad), PARTS.value)
    # Not in half precision for half images: that would round twice, and these launches are bound by arithmetic.
    resized_grads = pivot.new_empty(grad.shape)
    scale = _split([1 / s for s in std])
    shared = (images, *images.stride(), drawn, *sizes, parts, scale, grad, *grad.stride(), pivot)
    meta = _meta(images, grad)
    pixels = images.shape[2] * images.shape[3]
    gather = sizes._replace(chunks=triton.cdiv(pixels, BLOCK))
    with on_device(images):
        contrast_parts_kernel[(len(grad) * sizes.parts,)](
            *shared, STRAIGHT=straight_through, maxnreg=CONTRAST_REGISTERS, **meta
        )
        resized_grad_kernel[(len(grad) * sizes.chunks,)](
            *shared, resized_grads, STRAIGHT=straight_through, maxnreg=REGISTERS, **meta
        )
        del meta["TWO_TAPS"]
        gather_kernel[(len(images) * gather.chunks,)](
            grad_images, *grad_images.stride(), drawn, *gather, resized_grads, **meta
        )


def _sizes(images: Tensor, views: Tensor) -> Sizes:
    n, _, height, width = images.shape
    m, _, out_height, out_width = views.shape
    chunks = triton.cdiv(out_height * out_width, BLOCK)
    return Sizes(n, m, height, width, out_height, out_width, min(chunks, PARTS.value), chunks)


def _meta(images: Tensor, views: Tensor) -> dict[str, Any]:
    """Compile-time arguments of the kernels."""
    two_taps = images.shape[2] <= views.shape[2] and images.shape[3] <= views.shape[3]
    extents = ((x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) for x in (images, views))
    return {
        "TWO_TAPS": two_taps,
        "OFFSET": tl.int64 if max(extents) >= 2**31 else tl.int32,
        "COMPUTE": tl.float64 if images.dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }


def _split(numbers: Sequence[float]) -> tuple[float, ...]:
    """The numbers rounded to float32, as a kernel takes them, and then their rounding errors, for float64."""
    rounded = [struct.unpack("f", struct.pack("f", x))[0] for x in numbers]
    return (*rounded, *(x - y for x, y in zip(numbers, rounded, strict=True)))


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's, that compile all kernels of this file: every variant, or a few."""
    few = ((torch.bfloat16, 96),)
    every = ((dtype, size) for dtype in (torch.float32, torch.float16, torch.uint8) for size in (128, 96))
    for dtype, size in every if thorough else few:
        images = torch.empty(8, 3, 128, 128, dtype=dtype, device=device)
        views = torch.empty(8, 3, size, size, device=device)
        crop, factors, row = (torch.empty(8, *shape, device=device) for shape in ((4,), (4,), ()))
        drawn = (crop.long(), row.bool(), crop.long(), factors, row.bool(), row.bool(), row)
        numbers = (0.5, 0.5, 0.5)
        name = f"{str(dtype).removeprefix('torch.')} {'2x2' if size == 128 else 'any'} taps"
        yield name, partial(augment_forward, images, *drawn, numbers, numbers, views, row)
        for straight_through in ((False, True) if thorough else (False,)) if dtype != torch.uint8 else ():
            clamp = "straight_through" if straight_through else "exact"
            grad = (views, images, *drawn, row, numbers, straight_through, images)
            yield f"{name} {clamp}", partial(augment_backward, *grad)
