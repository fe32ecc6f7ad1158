"""Triton kernels of the augmentation's backward; see augment.py."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import triton
import triton.language as tl
from copgen_fast.kernels.color import Drawn, apply_jitter, jitter_vjp, load_jitter, luminance, tie
from copgen_fast.kernels.launch import PLANS, Launch, Layout, on_device
from copgen_fast.kernels.resize import (
    Sizes,
    Strides,
    first_top,
    first_within,
    last_within,
    load_crop,
    open_crop,
    pixels_of,
    plane_pointers,
    read_rows,
    triangle,
)
from copgen_fast.kernels.views import (
    PIXELS,
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

# A thread of the first kernel makes one pixel of a row: what it keeps of two would leave a multiprocessor 12 warps, and
# so it has 20. Its strips have more rows than the forward's, so that these pixels pay less for reading the parameters.
WARPS = 4
ROWS = 16
REGISTERS = 96
# The gather's threads have eight pixels each, which share the weights of columns.
GATHERED = 512


@kernel
def resized_grad_kernel(
    images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width,
    parts, scale, grads, t0, t1, t2, t3, pivots, kept, kept_right,
    STRAIGHT: tl.constexpr, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Gradient of the resized pixels without that of the contrast's mean, what each unit of that adds, and its parts.

    Both are divided by the sums of the pixels' weights. With TWO_TAPS they are summed along the columns, too, into the
    rows of the crop that a strip reads, from the first one; else KEPT is ROWS, and they are the strip's own rows.
    `kept` is [M, strips, tiles, KEPT, 2 x 3, COLUMNS]. The compiler doesn't know that its last stride is 1, so that all
    tensors have one layout: Triton 3.6 fails to convert that of these stores.
    """
    strides = Strides(s0, s1, s2, s3)
    grad_strides = Strides(t0, t1, t2, t3)
    sizes = Sizes(n, m, height, width, out_height, out_width)
    view = tl.program_id(0)
    jitter, ordered = load_jitter(drawn, view, COMPUTE)
    crop, inside = load_crop(drawn, view, sizes)
    if ~(ordered & inside):
        return
    row, column = pixels_of(ROWS, STRIPS, COLUMNS)
    red, green, blue, down, right = plane_pointers(grads, grad_strides, view, OFFSET)
    to_column = (column * right)[None, :]
    in_width = (column < out_width)[None, :]
    pivot = tl.load(pivots + view)
    gray = tl.load(drawn.gray + view)
    solarize = tl.load(drawn.solarize + view).to(COMPUTE)
    source, rows = open_crop(images, strides, sizes, view, crop, row, column, TWO_TAPS, OFFSET, COMPUTE)
    strip = tl.cast(view, tl.int64) * (tl.num_programs(1) * STRIPS) + tl.program_id(1) * STRIPS + tl.arange(0, STRIPS)
    kept += ((strip * tl.num_programs(2) + tl.program_id(2)) * (KEPT * 6 * COLUMNS))[:, None]
    kept += (tl.arange(0, COLUMNS) * kept_right)[None, :]
    total = tl.zeros((STRIPS, COLUMNS), COMPUTE)
    nothing = (total, total, total)
    grad_above = nothing
    grad_below = nothing
    mean_above = nothing
    mean_below = nothing
    for _ in range(ROWS):
        last_top = rows.top
        r, g, b, norm, rows = read_rows(source, rows, sizes, crop, TWO_TAPS, OFFSET, COMPUTE)
        in_height = row < out_height
        exists = in_height[:, None] & in_width
        offset = (row * down)[:, None] + to_column
        gr = tl.load(red + offset, exists, 0.0).to(COMPUTE) * precise(scale, 0, COMPUTE)
        gg = tl.load(green + offset, exists, 0.0).to(COMPUTE) * precise(scale, 1, COMPUTE)
        gb = tl.load(blue + offset, exists, 0.0).to(COMPUTE) * precise(scale, 2, COMPUTE)
        r, g, b, before_hue, after = apply_jitter(r, g, b, jitter, pivot)
        if solarize < float("inf"):
            gr, gg, gb = _solarize_vjp(gr, gg, gb, r, g, b, gray, solarize - tie(r))
        if gray:
            sum_of = gr + gg + gb
            gr = 0.2989 * sum_of
            gg = 0.587 * sum_of
            gb = 0.114 * sum_of
        grad, of_mean, of_contrast = jitter_vjp(gr, gg, gb, before_hue, after, jitter, STRAIGHT)
        total += of_contrast
        if TWO_TAPS:
            moved = (rows.top != last_top)[:, None]
            _store(kept, grad_above, mean_above, moved & in_width)
            kept += tl.where(moved, 6 * COLUMNS, 0)
            upper = norm * tl.where(in_height, 1 - rows.beyond, 0.0)[:, None]
            lower = norm * tl.where(in_height, rows.beyond, 0.0)[:, None]
            grad_above, grad_below = _moved(grad_above, grad_below, moved, grad, upper, lower)
            mean_above, mean_below = _moved(mean_above, mean_below, moved, of_mean, upper, lower)
        else:
            grad = (grad[0] * norm, grad[1] * norm, grad[2] * norm)
            _store(kept, grad, (of_mean[0] * norm, of_mean[1] * norm, of_mean[2] * norm), exists)
            kept += 6 * COLUMNS
        row += 1
    if TWO_TAPS:
        _store(kept, grad_above, mean_above, in_width)
        _store(kept + 6 * COLUMNS, grad_below, mean_below, in_width)
    if jitter.contrast != 0:
        tl.store(part_of(parts, view), tl.sum(total))


@triton.jit
def _store(target, grad, of_mean, mask):
    step: tl.constexpr = grad[0].shape[1]
    tl.store(target, grad[0], mask)
    tl.store(target + step, grad[1], mask)
    tl.store(target + 2 * step, grad[2], mask)
    tl.store(target + 3 * step, of_mean[0], mask)
    tl.store(target + 4 * step, of_mean[1], mask)
    tl.store(target + 5 * step, of_mean[2], mask)


@triton.jit
def _moved(above, below, moved, values, upper, lower):
    """Sums into two rows, after they have moved on by one where `moved`."""
    above = (
        tl.where(moved, below[0], above[0]) + upper * values[0],
        tl.where(moved, below[1], above[1]) + upper * values[1],
        tl.where(moved, below[2], above[2]) + upper * values[2],
    )
    below = (
        tl.where(moved, 0.0, below[0]) + lower * values[0],
        tl.where(moved, 0.0, below[1]) + lower * values[1],
        tl.where(moved, 0.0, below[2]) + lower * values[2],
    )
    return above, below


@kernel
def gather_kernel(
    grad_images, s0, s1, s2, s3, drawn, n, m, height, width, out_height, out_width,
    parts, part_count, kept, strips, tiles,
    TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    KEPT: tl.constexpr, KEPT_OF: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the images: each pixel sums the contributions of all views of its image, in one order.

    The views' are in strips of KEPT_OF rows, of which KEPT are kept: see resized_grad_kernel.
    """
    strides = Strides(s0, s1, s2, s3)
    sizes = Sizes(n, m, height, width, out_height, out_width)
    image = tl.program_id(0)
    row, column = pixels_of(ROWS, STRIPS, COLUMNS)
    gr = tl.zeros((STRIPS, COLUMNS), COMPUTE)
    gg = tl.zeros((STRIPS, COLUMNS), COMPUTE)
    gb = tl.zeros((STRIPS, COLUMNS), COMPUTE)
    start = tl.program_id(1) * STRIPS
    for view in range(image, sizes.views, sizes.images):
        jitter, ordered = load_jitter(drawn, view, COMPUTE)
        crop, inside = load_crop(drawn, view, sizes)
        apart = (start + STRIPS <= crop.top) | (start >= crop.top + crop.height)
        if ordered & inside & ~apart:
            share = tl.zeros((), COMPUTE)
            if jitter.contrast != 0:
                share = jitter.contrast * total_of(parts, view, part_count, COMPUTE) / (out_height * out_width)
            y = row - crop.top
            x = column - crop.left
            inside_y = (y >= 0) & (y < crop.height)
            inside_x = (x >= 0) & (x < crop.width)
            y = tl.where(inside_y, y, 0)
            x = tl.where(inside_x, x, 0)
            count_y = (2 * tl.maximum(crop.height, out_height) + crop.height - 1) // crop.height
            count_x = (2 * tl.maximum(crop.width, out_width) + crop.width - 1) // crop.width
            first_y = first_within(y, out_height, crop.height, count_y)
            first_x = first_within(x, out_width, crop.width, count_x)
            source = kept + tl.cast(view, tl.int64) * strips * tiles * (KEPT * 6 * TILE)
            if TWO_TAPS:
                i = tl.maximum(first_y, 0) // KEPT_OF
                last = tl.minimum(last_within(y, out_height, crop.height), out_height - 1) // KEPT_OF
                count_y = tl.max(last - i) + 1
            else:
                i = first_y
                last = first_y
            for _ in range(count_y):
                if TWO_TAPS:
                    in_rows = (inside_y & (i <= last))[:, None]
                    weight_y = 1.0
                    strip = i
                    slot = y - first_top(i * KEPT_OF, crop.height, out_height)
                else:
                    weight_y = triangle(i, y, crop.height, out_height, COMPUTE)[:, None]
                    in_rows = (inside_y & (i >= 0) & (i < out_height))[:, None] & (weight_y > 0)
                    strip = i // KEPT_OF
                    slot = i % KEPT_OF
                to_row = ((strip * tiles * KEPT + slot) * (6 * TILE))[:, None]
                j = first_x
                for _ in range(count_x):
                    weight = triangle(j, x, crop.width, out_width, COMPUTE)
                    touched = in_rows & (inside_x & (j >= 0) & (j < out_width) & (weight > 0))[None, :]
                    weight = weight_y * weight[None, :]
                    at = tl.where(crop.flip, out_width - 1 - j, j)
                    place = source + (to_row + (at // TILE * (KEPT * 6 * TILE) + at % TILE)[None, :])
                    r = tl.load(place, touched, 0.0) + share * tl.load(place + 3 * TILE, touched, 0.0)
                    g = tl.load(place + TILE, touched, 0.0) + share * tl.load(place + 4 * TILE, touched, 0.0)
                    b = tl.load(place + 2 * TILE, touched, 0.0) + share * tl.load(place + 5 * TILE, touched, 0.0)
                    gr += weight * r
                    gg += weight * g
                    gb += weight * b
                    j += 1
                i += 1
    red, green, blue, down, right = plane_pointers(grad_images, strides, image, OFFSET)
    exists = (row < height)[:, None] & (column < width)[None, :]
    offset = (row * down)[:, None] + (column * right)[None, :]
    tl.store(red + offset, gr, exists)
    tl.store(green + offset, gg, exists)
    tl.store(blue + offset, gb, exists)


@triton.jit
def _solarize_vjp(gr, gg, gb, r, g, b, gray, threshold):
    if gray:
        r = luminance(r, g, b)
        g = r
        b = r
    return tl.where(r >= threshold, -gr, gr), tl.where(g >= threshold, -gg, gg), tl.where(b >= threshold, -gb, gb)


def augment_backward(
    grad: Tensor,
    images: Tensor,
    *drawn: Tensor,
    pivot: Tensor,
    std: Sequence[float],
    straight_through: bool,
    grad_images: Tensor,
) -> None:
    """Fill `grad_images`, the gradient of `images`, from that of the views; see ops/augment/operator.py."""
    launch = _backward_of(*map(Layout.of, (images, grad, grad_images)), tuple(std), straight_through)
    with on_device(images):
        launch(grad, images, Drawn(*(x.contiguous() for x in drawn)), pivot, grad_images)


@lru_cache(PLANS)
def _backward_of(
    images: Layout, grads: Layout, grad_images: Layout, std: tuple[float, ...], straight_through: bool
) -> Callable[[Tensor, Tensor, Drawn, Tensor, Tensor], None]:
    """Both launches for images and views of these sizes: what they have in common is found once."""
    grid, tiling = tiling_of(grads, PIXELS, ROWS)
    gathered, tiles = tiling_of(grad_images, GATHERED, 1)
    meta, sizes, parts = constants_of(images, grads), sizes_of(images, grads), parts_of(grid)
    rows, columns = tiling["ROWS"] + meta["TWO_TAPS"], tiling["COLUMNS"]
    scale = split([1 / s for s in std])
    of_views = (grads.shape[0], grid[1] * tiling["STRIPS"], grid[2], rows, 6, columns)
    # For narrow views, of which a program makes several strips at once, the assembler would spill a little.
    registers = REGISTERS if tiling["STRIPS"] == 1 else 112
    first = meta | tiling | {"STRAIGHT": straight_through, "KEPT": rows, "num_warps": WARPS, "maxnreg": registers}
    resized_grad = Launch(resized_grad_kernel, grid, **first)
    gather = Launch(gather_kernel, gathered, KEPT=rows, KEPT_OF=tiling["ROWS"], TILE=columns, **meta, **tiles)

    def launch(grad: Tensor, x: Tensor, drawn: Drawn, pivot: Tensor, grad_x: Tensor) -> None:
        sums = pivot.new_empty(parts)
        # Not in half precision for half images: that would round twice.
        kept = pivot.new_empty(of_views)
        given = (sums, scale, grad, *grads.strides, pivot, kept, 1)
        resized_grad(x, *images.strides, drawn, *sizes, *given)
        gather(grad_x, *grad_images.strides, drawn, *sizes, sums, parts[1], kept, *of_views[1:3])

    return launch
