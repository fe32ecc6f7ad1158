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
    """Numbers of images and views, their sizes, and the programs that make one view."""

    images: object
    views: object
    height: object
    width: object
    out_height: object
    out_width: object
    parts: object  # of a sum over a view
    chunks: object


class Crop(NamedTuple):
    """Crop and flip of one view, in pixels."""

    top: object
    left: object
    height: object
    width: object
    flip: object


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
def pixels_of(start, count, width, BLOCK: tl.constexpr):
    """Rows and columns of BLOCK pixels from `start`, and which of them exist; the others repeat the last."""
    pixel = start + tl.arange(0, BLOCK)
    exists = pixel < count
    pixel = tl.minimum(pixel, count - 1)
    row = pixel // width
    return row, pixel - row * width, exists


@triton.jit
def plane_pointers(tensor, strides, image, OFFSET: tl.constexpr):
    """Pointers to the three channels of an image, and the strides within a channel."""
    red = tensor + tl.cast(image, tl.int64) * strides.image
    channel = tl.cast(strides.channel, tl.int64)
    return red, red + channel, red + 2 * channel, tl.cast(strides.row, OFFSET), tl.cast(strides.column, OFFSET)


@triton.jit
def read_resized(
    images, strides, sizes, view, crop, row, column, TWO_TAPS: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Pixels (row, column) of a view in [0, 1], and the inverse of their weights' sum.

    TWO_TAPS: no crop is larger than the view, so that each pixel mixes 2 x 2, the border repeated.
    """
    height = sizes.out_height
    width = sizes.out_width
    column = tl.where(crop.flip, width - 1 - column, column)
    red, green, blue, down, right = plane_pointers(images, strides, view % sizes.images, OFFSET)
    corner = crop.top.to(OFFSET) * down + crop.left.to(OFFSET) * right
    red += corner
    green += corner
    blue += corner
    if TWO_TAPS:
        row, next_row, beyond_y, norm_y = _two_taps(row, crop.height, height, COMPUTE)
        column, next_column, beyond_x, norm_x = _two_taps(column, crop.width, width, COMPUTE)
        taps = (row * down + column * right, row * down + next_column * right)
        taps_below = (next_row * down + column * right, next_row * down + next_column * right)
        r = _mix(red, taps, taps_below, beyond_y, beyond_x, COMPUTE)
        g = _mix(green, taps, taps_below, beyond_y, beyond_x, COMPUTE)
        b = _mix(blue, taps, taps_below, beyond_y, beyond_x, COMPUTE)
        scale = 1 / (norm_y * norm_x)
    else:
        reach_y = tl.maximum(crop.height, height)
        reach_x = tl.maximum(crop.width, width)
        count_y = (2 * reach_y + height - 1) // height
        count_x = (2 * reach_x + width - 1) // width
        first_y = first_within(row, crop.height, height, count_y)
        first_x = first_within(column, crop.width, width, count_x)
        r = tl.zeros(row.shape, COMPUTE)
        g = tl.zeros(row.shape, COMPUTE)
        b = tl.zeros(row.shape, COMPUTE)
        total = tl.zeros(row.shape, COMPUTE)
        for tap_y in range(count_y):
            y = first_y + tap_y
            weight_y = triangle(row, y, crop.height, height, COMPUTE)
            weight_y = tl.where((y >= 0) & (y < crop.height), weight_y, 0.0)
            for tap_x in range(count_x):
                x = first_x + tap_x
                weight = weight_y * triangle(column, x, crop.width, width, COMPUTE)
                touched = (weight > 0) & (x >= 0) & (x < crop.width)
                weight = tl.where(touched, weight, 0.0)
                offset = y * down + x * right
                r += weight * tl.load(red + offset, touched, 0).to(COMPUTE)
                g += weight * tl.load(green + offset, touched, 0).to(COMPUTE)
                b += weight * tl.load(blue + offset, touched, 0).to(COMPUTE)
                total += weight
        scale = 1 / total
        r *= scale
        g *= scale
        b *= scale
    if images.dtype.element_ty == tl.uint8:
        r *= 1 / 255
        g *= 1 / 255
        b *= 1 / 255
    return r, g, b, scale


@triton.jit
def _two_taps(i, length, out, COMPUTE: tl.constexpr):
    """The pixels around the place of output pixel `i`, how far it lies beyond the first, and their weights' sum."""
    place = (2 * i + 1) * length + out
    first = place // (2 * out)
    rest = place - first * (2 * out)
    first -= 1
    beyond = rest.to(COMPUTE) * (1 / (2 * out).to(COMPUTE))
    norm = tl.where(first < 0, beyond, tl.where(first + 1 >= length, 1 - beyond, 1.0))
    # A second pixel of weight 0 is not read: it might be NaN.
    second = tl.minimum(first + tl.where(rest > 0, 1, 0), length - 1)
    return tl.maximum(first, 0), second, beyond, norm


@triton.jit
def _mix(plane, taps, taps_below, beyond_y, beyond_x, COMPUTE: tl.constexpr):
    above = tl.load(plane + taps[0]).to(COMPUTE)
    above += beyond_x * (tl.load(plane + taps[1]).to(COMPUTE) - above)
    below = tl.load(plane + taps_below[0]).to(COMPUTE)
    below += beyond_x * (tl.load(plane + taps_below[1]).to(COMPUTE) - below)
    return above + beyond_y * (below - above)


@triton.jit
def first_within(i, other_length, length, count):
    """First pixel of a grid of `other_length` that the triangle of pixel `i` of a grid of `length` reaches.

    It reaches `count` at most; the first may be negative.
    """
    reach = tl.maximum(other_length, length)
    place = (2 * i + 1) * other_length - 2 * reach - length + 2 * length * count
    return place // (2 * length) - count + 1


@triton.jit
def triangle(i, j, length, out, COMPUTE: tl.constexpr):
    """Weight, before normalisation, of pixel `j` of `length` in output pixel `i` of `out`."""
    distance = tl.abs((2 * i + 1) * length - (2 * j + 1) * out)
    reach = 2 * tl.maximum(length, out)
    # Integers are subtracted: 1 - distance / reach, contracted to one rounding, would not be 0 at the reach itself.
    return tl.maximum(reach - distance, 0).to(COMPUTE) * (1 / reach.to(COMPUTE))
