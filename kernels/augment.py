"""Triton kernels of the fused augmentation: crop, resize, flip, colour jitter, gray, solarise and normalise.

A program makes some rows of one view, so that branches on its parameters are uniform, and an op that a view does not
have costs nothing. What only the view, or a column, needs is computed once; going down a column, a crop's row is read
once, too.

Forward is two launches: a contrast blends with the mean luminance of its whole view, and programs of one launch cannot
wait for each other. The first computes partial sums of the means, and returns at once for views without a contrast.

Backward is two as well: the gradient of the resized pixels, through the colours, which are computed again, and its
gather into the images. The gradient of the contrast's mean, a number that the whole view adds to, is not known before
the second. So the first writes the gradient without it, and what each unit of it adds. There are no atomic additions.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
import triton.language as tl
from copgen_fast.kernels.augment_backward import augment_backward
from copgen_fast.kernels.color import Drawn, apply_jitter, before_contrast, load_jitter, luminance, poison, tie
from copgen_fast.kernels.filter import separable_filter
from copgen_fast.kernels.launch import PLANS, Launch, Layout, on_device
from copgen_fast.kernels.resize import Sizes, Strides, load_crop, open_crop, pixels_of, plane_pointers, read_rows
from copgen_fast.kernels.views import (
    PIXELS,
    ROWS,
    constants_of,
    kernel,
    part_of,
    parts_of,
    precise,
    sizes_of,
    split,
    tiling_of,
    total_of,
)
from torch import Tensor

__all__ = ["augment_backward", "augment_forward", "separable_filter"]


@kernel
def pivot_parts_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width,
    parts,
    TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of the luminance that the contrast of each view blends with."""
    strides = Strides(s0, s1, s2, s3)
    sizes = Sizes(n, m, height, width, out_height, out_width)
    view = tl.program_id(0)
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    if (jitter.contrast == 0) | ~(ordered & inside):
        return
    jitter = before_contrast(jitter)
    row, column = pixels_of(ROWS, STRIPS, COLUMNS)
    source, rows = open_crop(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
    total = tl.zeros((STRIPS, COLUMNS), COMPUTE)
    for _ in range(ROWS):
        r, g, b, _, rows = read_rows(source, rows, sizes, crop, TWO_TAPS, OFFSET, COMPUTE)
        nan = poison(r, g, b, jitter)
        r, g, b, _, _ = apply_jitter(r, g, b, jitter, 0.0)
        total += tl.where((row < out_height)[:, None], luminance(r, g, b) + nan, 0.0)
        row += 1
    total = tl.where((column < out_width)[None, :], total, 0.0)
    tl.store(part_of(parts, view), tl.sum(total))


@kernel
def forward_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width,
    parts, scale, shift, views, t0, t1, t2, t3, pivots,
    TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Views, and the pivots of their contrasts."""
    strides = Strides(s0, s1, s2, s3)
    view_strides = Strides(t0, t1, t2, t3)
    sizes = Sizes(n, m, height, width, out_height, out_width)
    view = tl.program_id(0)
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    valid = ordered & inside
    pivot = tl.zeros((), COMPUTE)
    if (jitter.contrast != 0) & valid:
        pivot = total_of(parts, view, tl.num_programs(1) * tl.num_programs(2), COMPUTE) / (out_height * out_width)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(pivots + view, pivot)

    row, column = pixels_of(ROWS, STRIPS, COLUMNS)
    red, green, blue, down, right = plane_pointers(views, view_strides, view, OFFSET)
    to_column = (column * right)[None, :]
    if not valid:
        nothing = tl.full((STRIPS, COLUMNS), float("nan"), COMPUTE)
        for _ in range(ROWS):
            exists = (row < out_height)[:, None] & (column < out_width)[None, :]
            offset = (row * down)[:, None] + to_column
            tl.store(red + offset, nothing, exists)
            tl.store(green + offset, nothing, exists)
            tl.store(blue + offset, nothing, exists)
            row += 1
        return
    gray = tl.load(drawn.gray + view)
    solarize = tl.load(drawn.solarize + view).to(COMPUTE)
    source, rows = open_crop(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
    for _ in range(ROWS):
        r, g, b, _, rows = read_rows(source, rows, sizes, crop, TWO_TAPS, OFFSET, COMPUTE)
        nan = poison(r, g, b, jitter) + (pivot - pivot)
        r, g, b, _, _ = apply_jitter(r, g, b, jitter, pivot)
        if gray:
            r = luminance(r, g, b)
            g = r
            b = r
        if solarize < float("inf"):
            threshold = solarize - tie(r)
            r = tl.where(r >= threshold, 1 - r, r)
            g = tl.where(g >= threshold, 1 - g, g)
            b = tl.where(b >= threshold, 1 - b, b)
        exists = (row < out_height)[:, None] & (column < out_width)[None, :]
        offset = (row * down)[:, None] + to_column
        tl.store(red + offset, r * precise(scale, 0, COMPUTE) + (precise(shift, 0, COMPUTE) + nan), exists)
        tl.store(green + offset, g * precise(scale, 1, COMPUTE) + (precise(shift, 1, COMPUTE) + nan), exists)
        tl.store(blue + offset, b * precise(scale, 2, COMPUTE) + (precise(shift, 2, COMPUTE) + nan), exists)
        row += 1


def augment_forward(
    images: Tensor,
    *drawn: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    views: Tensor,
    pivot: Tensor,
) -> None:
    """Fill `views` [V N, 3, h, w] from `images` [N, 3, H, W], and `pivot` [V N]; see ops/augment/operator.py."""
    launch = _forward_of(Layout.of(images), Layout.of(views), tuple(mean), tuple(std))
    with on_device(images):
        launch(images, Drawn(*(x.contiguous() for x in drawn)), views, pivot)


@lru_cache(PLANS)
def _forward_of(
    images: Layout, views: Layout, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Tensor, Drawn, Tensor, Tensor], None]:
    """Both launches for images and views of these sizes: what they have in common is found once."""
    grid, tiling = tiling_of(views, PIXELS, ROWS)
    meta = constants_of(images, views) | tiling
    pivot_parts, forward = (Launch(kernel, grid, **meta) for kernel in (pivot_parts_kernel, forward_kernel))
    sizes, parts = sizes_of(images, views), parts_of(grid)
    scale, shift = split([1 / s for s in std]), split([-m / s for m, s in zip(mean, std, strict=True)])

    def launch(x: Tensor, drawn: Drawn, y: Tensor, pivot: Tensor) -> None:
        shared = (x, *images.strides, drawn, *sizes, pivot.new_empty(parts))
        pivot_parts(*shared)
        forward(*shared, scale, shift, y, *views.strides, pivot)

    return launch


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's, that compile all kernels of this file: many variants, or a few."""
    few = ((torch.bfloat16, 128, 128, False),)
    many = ((torch.float16, 128, 128, False), (torch.uint8, 32, 32, False), (torch.float32, 32, 32, False))
    many += ((torch.float32, 32, 24, False), (torch.float32, 32, 24, True), (torch.float16, 32, 24, False))
    for dtype, side, size, straight_through in many if thorough else few:
        images = torch.empty(8, 3, side, side, dtype=dtype, device=device)
        views = torch.empty(8, 3, size, size, device=device)
        crop, factors, row = (torch.empty(8, *shape, device=device) for shape in ((4,), (4,), ()))
        drawn = (crop.long(), row.bool(), crop.long(), factors, row.bool(), row.bool(), row)
        numbers = (0.5, 0.5, 0.5)
        name = f"{str(dtype).removeprefix('torch.')} {side} to {size}"
        if not straight_through:
            given = {"mean": numbers, "std": numbers, "views": views, "pivot": row}
            yield name, partial(augment_forward, images, *drawn, **given)
        if dtype != torch.uint8:
            given = {"pivot": row, "std": numbers, "straight_through": straight_through, "grad_images": images}
            name = f"{name} {'straight_through' if straight_through else 'exact'}"
            yield name, partial(augment_backward, views, images, *drawn, **given)
