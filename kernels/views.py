"""What the augmentation's kernels share, forward and backward: sums over a view, tiles, and arguments of launches."""

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.launch import Layout, offsets
from copgen_fast.kernels.resize import Sizes

# What a program makes at once, two pixels a thread, and how often: reading a view's parameters takes some 500
# instructions.
PIXELS = 128
ROWS = 8
WARPS = 2
PARTS = tl.constexpr(32)

# Pixels are read one by one, so no size, stride or alignment is worth a compilation. Numbers are arguments of their
# own, as those of a tuple would be specialised all the same.
_ANY = ("images", "drawn", "views", "pivots", "grads", "grad_images")
_ANY += ("n", "m", "height", "width", "out_height", "out_width", "part_count", "strips", "tiles", "kept_right")
_ANY += ("s0", "s1", "s2", "s3", "t0", "t1", "t2", "t3")
kernel = triton.jit(do_not_specialize=_ANY)


@triton.jit
def part_of(parts, view):
    """Where this program's part of a sum over its view is."""
    part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    return parts + tl.cast(view, tl.int64) * (tl.num_programs(1) * tl.num_programs(2)) + part


@triton.jit
def total_of(parts, view, count, COMPUTE: tl.constexpr):
    """Sum of a view's parts, in one order."""
    total = tl.zeros((PARTS,), COMPUTE)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts + tl.cast(view, tl.int64) * count + part, part < count, 0.0)
    return tl.sum(total)


@triton.jit
def precise(numbers, channel: tl.constexpr, COMPUTE: tl.constexpr):
    """One of three numbers, each given as a float32 and its rounding error."""
    number = tl.cast(numbers[channel], COMPUTE)
    if COMPUTE == tl.float64:
        number += tl.cast(numbers[channel + 3], COMPUTE)
    return number


def sizes_of(images: Layout, views: Layout) -> Sizes:
    n, _, height, width = images.shape
    m, _, out_height, out_width = views.shape
    return Sizes(n, m, height, width, out_height, out_width)


def tiling_of(images: Layout, pixels: int, rows: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid, and which pixels of an image a program makes: `pixels` at a time, of strips of at most `rows` rows."""
    count, _, height, width = images.shape
    columns, rows = (128, rows) if width > 64 else (32, min(rows, 2))
    strips = pixels // columns
    tiling = {"COLUMNS": columns, "STRIPS": strips, "ROWS": rows}
    return (count, triton.cdiv(height, strips * rows), triton.cdiv(width, columns)), tiling


def parts_of(grid: tuple[int, int, int]) -> tuple[int, int]:
    """Shape of the parts of a sum over each view."""
    return grid[0], grid[1] * grid[2]


def constants_of(images: Layout, views: Layout) -> dict[str, Any]:
    """Compile-time arguments of the kernels."""
    two_taps = images.shape[2] <= views.shape[2] and images.shape[3] <= views.shape[3]
    extents = ((x.shape[2] - 1) * x.strides[2] + (x.shape[3] - 1) * x.strides[3] for x in (images, views))
    return {
        "TWO_TAPS": two_taps,
        "OFFSET": offsets(*extents),
        "COMPUTE": tl.float64 if images.dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }


def split(numbers: Sequence[float]) -> tuple[float, ...]:
    """The numbers rounded to float32, as a kernel takes them, and then their rounding errors, for float64."""
    rounded = [struct.unpack("f", struct.pack("f", x))[0] for x in numbers]
    return (*rounded, *(x - y for x, y in zip(numbers, rounded, strict=True)))
