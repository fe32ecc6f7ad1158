"""Strips of rows of images: a layer computed strip by strip keeps intermediate values in a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Finish = Callable[[Tensor, Tensor, slice, slice], None]
"""finish(values, out, images, rows): what follows a layer on a strip; `values` may be `out`."""


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


def divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`, at least 1."""
    return next(k for k in range(max(1, min(count, limit)), 0, -1) if count % k == 0)
