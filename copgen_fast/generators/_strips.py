"""Layers computed in strips of rows: intermediate values stay in a cache, and take no new pages of memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.strips import Finish, divisor, strips

VALUES = 2**21  # of a strip's outputs: 8 MB, so that with what they are made of they fit a shared cache


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
