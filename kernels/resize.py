"""Triton functions of crop, antialiased bilinear resize and flip, and the weights of the adjoint.

An output pixel i of `out` lies |(2 i + 1) length - (2 j + 1) out| / (2 out) pixels from pixel j of a crop of `length`:
places are compared as integers, exactly. The filter is a triangle as wide as the coarser of the two grids.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Strides(NamedTuple):
    """Strides of a tensor of images."""

    image: object
    channel: object
    row: object
    column: object


class Sizes(NamedTuple):
    """Numbers of images and views, and their sizes."""

    images: object
    views: object
    height: object
    width: object
    out_height: object
    out_width: object


class Crop(NamedTuple):
    """Crop and flip of one view, in pixels."""

    top: object
    left: object
    height: object
    width: object
    flip: object


class Source(NamedTuple):
    """A crop, and what the columns of a view read of it: pointers to its corner in each channel, and offsets."""

    red: object
    green: object
    blue: object
    down: object
    right: object
    column: object  # of the first pixel, or without TWO_TAPS its index
    next_column: object  # of the second, or without TWO_TAPS the view's column
    beyond: object  # how far the place of the column lies beyond the first
    norm: object  # inverse of the weights' sum


class Rows(NamedTuple):
    """Where the next rows of a view are in the crop, and which of its rows the last ones read: `top` and the one after
    it, mixed along the columns. Without TWO_TAPS, `first` is the row itself."""

    first: object
    rest: object
    top: object
    beyond: object  # the weight of the row after `top`
    above: object
    below: object


@triton.jit
def load_crop(drawn, view, sizes):
    """Crop of `view`, and whether it is within its image."""
    crop = drawn.crop + 4 * view
    top = tl.load(crop)
    left = tl.load(crop + 1)
    rows = tl.load(crop + 2)
    columns = tl.load(crop + 3)
    # Without sums, which huge numbers would overflow.
    inside = (top >= 0) & (rows > 0) & (rows <= sizes.height) & (top <= sizes.height - rows)
    inside &= (left >= 0) & (columns > 0) & (columns <= sizes.width) & (left <= sizes.width - columns)
    flip = tl.load(drawn.flip + view)
    return Crop(top.to(tl.int32), left.to(tl.int32), rows.to(tl.int32), columns.to(tl.int32), flip), inside


@triton.jit
def pixels_of(ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row of each of a program's strips of ROWS rows, and its columns: the grid is (any, rows, columns)."""
    row = (tl.program_id(1) * STRIPS + tl.arange(0, STRIPS)) * ROWS
    return row, tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def plane_pointers(tensor, strides, image, OFFSET: tl.constexpr):
    """Pointers to the three channels of an image, and the strides within a channel."""
    red = tensor + tl.cast(image, tl.int64) * strides.image
    channel = tl.cast(strides.channel, tl.int64)
    return red, red + channel, red + 2 * channel, tl.cast(strides.row, OFFSET), tl.cast(strides.column, OFFSET)


@triton.jit
def open_crop(
    images, strides, sizes, view, crop, row, column, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Start reading a view from each `row` downwards, at all columns; see `read_rows`."""
    red, green, blue, down, right = plane_pointers(images, strides, view % sizes.images, OFFSET)
    corner = crop.top.to(OFFSET) * down + crop.left.to(OFFSET) * right
    red += corner
    green += corner
    blue += corner
    column = tl.minimum(column, sizes.out_width - 1)
    column = tl.where(crop.flip, sizes.out_width - 1 - column, column)
    if TWO_TAPS:
        first, rest = _place(column, crop.width, sizes.out_width)
        beyond = rest.to(COMPUTE) * (1 / (2 * sizes.out_width).to(COMPUTE))
        norm = _norm(first, beyond, crop.width)
        next_column = _second(first, rest, crop.width) * right
        column = tl.maximum(first, 0) * right
        source = Source(
            red, green, blue, down, right, column[None, :], next_column[None, :], beyond[None, :], norm[None, :]
        )
        first, rest = _place(row, crop.height, sizes.out_height)
        top = tl.minimum(tl.maximum(first, 0), crop.height - 1)
        above = _mixed(source, top, COMPUTE)
        rows = Rows(first, rest, top, rest.to(COMPUTE), above, above)
    else:
        count = (2 * tl.maximum(crop.width, sizes.out_width) + sizes.out_width - 1) // sizes.out_width
        first = first_within(column, crop.width, sizes.out_width, count)
        source = Source(red, green, blue, down, right, first[None, :], column[None, :], count, 1)
        rows = Rows(row, 0, 0, 0, (0, 0, 0), (0, 0, 0))
    return source, rows


@triton.jit
def read_rows(source, rows, sizes, crop, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """The next rows' pixels in [0, 1], the inverse of the sum of their triangles' weights, and what is left to read.

    TWO_TAPS: no crop is larger than the view, so that each pixel mixes 2 x 2, the border repeated, and the next row
    at most one new row of the crop. The sum is that along the columns.
    """
    if TWO_TAPS:
        first = rows.first
        rest = rows.rest
        top = tl.minimum(tl.maximum(first, 0), crop.height - 1)
        bottom = _second(first, rest, crop.height)
        beyond = rest.to(COMPUTE) * (1 / (2 * sizes.out_height).to(COMPUTE))
        beyond = tl.where(top == bottom, 0.0, beyond)
        scale = source.norm
        below = _mixed(source, bottom, COMPUTE)
        same = (top == rows.top)[:, None]
        only = (top == bottom)[:, None]
        above_r = tl.where(only, below[0], tl.where(same, rows.above[0], rows.below[0]))
        above_g = tl.where(only, below[1], tl.where(same, rows.above[1], rows.below[1]))
        above_b = tl.where(only, below[2], tl.where(same, rows.above[2], rows.below[2]))
        r = above_r + beyond[:, None] * (below[0] - above_r)
        g = above_g + beyond[:, None] * (below[1] - above_g)
        b = above_b + beyond[:, None] * (below[2] - above_b)
        rest += 2 * crop.height
        further = rest >= 2 * sizes.out_height
        rest = tl.where(further, rest - 2 * sizes.out_height, rest)
        rows = Rows(first + further.to(tl.int32), rest, top, beyond, (above_r, above_g, above_b), below)
    else:
        row = tl.minimum(rows.first, sizes.out_height - 1)
        rows = Rows(rows.first + 1, 0, 0, 0, (0, 0, 0), (0, 0, 0))
        count = (2 * tl.maximum(crop.height, sizes.out_height) + sizes.out_height - 1) // sizes.out_height
        y = first_within(row, crop.height, sizes.out_height, count)
        column = source.next_column
        r = tl.zeros((row.shape[0], column.shape[1]), COMPUTE)
        g = tl.zeros((row.shape[0], column.shape[1]), COMPUTE)
        b = tl.zeros((row.shape[0], column.shape[1]), COMPUTE)
        total = tl.zeros((row.shape[0], column.shape[1]), COMPUTE)
        for _ in range(count):
            weight_y = triangle(row, y, crop.height, sizes.out_height, COMPUTE)
            weight_y = tl.where((y >= 0) & (y < crop.height), weight_y, 0.0)[:, None]
            offset_y = (y * source.down)[:, None]
            x = source.column
            for _ in range(source.beyond):
                weight_x = triangle(column, x, crop.width, sizes.out_width, COMPUTE)
                weight = weight_y * tl.where((x >= 0) & (x < crop.width), weight_x, 0.0)
                touched = weight > 0
                offset = offset_y + x * source.right
                r += weight * tl.load(source.red + offset, touched, 0).to(COMPUTE)
                g += weight * tl.load(source.green + offset, touched, 0).to(COMPUTE)
                b += weight * tl.load(source.blue + offset, touched, 0).to(COMPUTE)
                total += weight
                x += 1
            y += 1
        scale = 1 / total
        r *= scale
        g *= scale
        b *= scale
    if source.red.dtype.element_ty == tl.uint8:
        r *= 1 / 255
        g *= 1 / 255
        b *= 1 / 255
    return r, g, b, scale, rows


@triton.jit
def quotient(number, divisor):
    """Of numbers that aren't negative, which takes half the instructions of others."""
    return (number.to(tl.uint32) // divisor.to(tl.uint32)).to(tl.int32)


@triton.jit
def _place(i, length, out):
    """The pixel at or before the place of output pixel `i`, and how far the place lies beyond it, in parts of 2 out."""
    place = (2 * i + 1) * length + out
    first = quotient(place, 2 * out)
    return first - 1, place - first * (2 * out)


@triton.jit
def _second(first, rest, length):
    """The pixel after the place: one of weight 0 is not read, as it might be NaN."""
    return tl.minimum(first + tl.where(rest > 0, 1, 0), length - 1)


@triton.jit
def _norm(first, beyond, length):
    """Inverse of the sum of two weights, of which those beyond the crop are left out."""
    return 1 / tl.where(first < 0, beyond, tl.where(first + 1 >= length, 1 - beyond, 1.0))


@triton.jit
def _mixed(source, y, COMPUTE: tl.constexpr):
    """Rows `y` of the crop at the places of the columns."""
    offset = (y * source.down)[:, None]
    left = offset + source.column
    right = offset + source.next_column
    return (
        _mix(source.red, left, right, source.beyond, COMPUTE),
        _mix(source.green, left, right, source.beyond, COMPUTE),
        _mix(source.blue, left, right, source.beyond, COMPUTE),
    )


@triton.jit
def _mix(plane, left, right, beyond, COMPUTE: tl.constexpr):
    value = tl.load(plane + left).to(COMPUTE)
    return value + beyond * (tl.load(plane + right).to(COMPUTE) - value)


@triton.jit
def first_within(i, other_length, length, count):
    """First pixel of a grid of `other_length` that the triangle of pixel `i` of a grid of `length` reaches.

    It reaches `count` at most; the first may be negative.
    """
    reach = tl.maximum(other_length, length)
    place = (2 * i + 1) * other_length - 2 * reach - length + 2 * length * count
    return quotient(place, 2 * length) - count + 1


@triton.jit
def last_within(i, other_length, length):
    """The last one, where `other_length` is the larger; it may be beyond its grid."""
    return quotient((2 * i + 3) * other_length - length - 1, 2 * length)


@triton.jit
def first_top(row, length, out):
    """The crop's upper row that a view's `row` reads, with TWO_TAPS."""
    first, _ = _place(row, length, out)
    return tl.minimum(tl.maximum(first, 0), length - 1)


@triton.jit
def triangle(i, j, length, out, COMPUTE: tl.constexpr):
    """Weight, before normalisation, of pixel `j` of `length` in output pixel `i` of `out`."""
    distance = tl.abs((2 * i + 1) * length - (2 * j + 1) * out)
    reach = 2 * tl.maximum(length, out)
    # Integers are subtracted: 1 - distance / reach, contracted to one rounding, would not be 0 at the reach itself.
    return tl.maximum(reach - distance, 0).to(COMPUTE) * (1 / reach.to(COMPUTE))
