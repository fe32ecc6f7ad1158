"""Layers computed in strips of rows: intermediate values stay in a cache, and take no new pages of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Finish = Callable[[Tensor, Tensor, slice, slice], None]
"""finish(values, out, images, rows): what follows a convolution; `values` may be `out`."""

VALUES = 2**21  # of a strip's outputs: 8 MB, so that with what they are made of they fit a shared cache


def strips(
    x: Tensor, images: int, rows: int, scale: int = 1, styles: Tensor | None = None
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Strips of images [N, H, W, C], their places among the images and among the rows of outputs `scale` times as high.

    A strip [images, rows + 2, W + 2, C] is times `styles` [N, C], with a border of neighbours or of zeros; the next one
    overwrites it. N and H are multiples of `images` and `rows`.
    """
    n, height, width, channels = x.shape
    strip = x.new_zeros(images, rows + 2, width + 2, channels)
    for image in range(0, n, images):
        chosen = slice(image, image + images)
        for first in range(0, height, rows):
            last = first + rows
            above, below = max(0, first - 1), min(height, last + 1)
            into = strip[:, 1 + above - first : 1 + below - first, 1:-1]
            if styles is None:
                into.copy_(x[chosen, above:below])
            else:
                torch.mul(x[chosen, above:below], styles[chosen, None, None], out=into)
            if first == 0:
                strip[:, 0].zero_()
            if last == height:
                strip[:, -1].zero_()
            yield strip, chosen, slice(scale * first, scale * last)


def upsampled(x: Tensor, weight: Tensor, taps: Tensor, styles: Tensor, finish: Finish) -> Tensor:
    """Images [N, H, W, C] times styles to [N, 2H, 2W, O] by `FULL_TRANSPOSED` and `SMOOTHED`."""
    (n, height, width, _), outputs = x.shape, weight.shape[1]
    out = x.new_empty(n, 2 * height, 2 * width, outputs)
    if not n:
        return out
    row = 4 * width * outputs
    rows = divisor(height, VALUES // row)
    images = divisor(n, VALUES // (rows * row)) if rows == height else 1
    for strip, chosen, lines in strips(x, images, rows, 2, styles):
        wide = F.conv_transpose2d(strip.permute(0, 3, 1, 2), weight, stride=2)
        values = F.conv2d(wide[:, :, 1:-1, 1:-1], taps, groups=outputs)
        finish(values.permute(0, 2, 3, 1), out[chosen, lines], chosen, lines)
    return out


def divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`, at least 1."""
    return next(k for k in range(max(1, min(count, limit)), 0, -1) if count % k == 0)
