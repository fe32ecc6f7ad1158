"""Image grids as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime import artifacts


def grid_png(images: Tensor, columns: int) -> bytes:
    """PNG bytes of images [N, 3, H, W] in [-1, 1], row by row with `columns` to a row.

    Raises:
        TypeError, ValueError: images of another dtype or shape.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    grid = make_grid(images.detach().float().cpu().clamp(-1, 1).add(1).div(2), nrow=columns, padding=2, pad_value=1.0)
    pixels = grid.mul(255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write `grid_png` to a file."""
    artifacts.write_bytes(path, grid_png(images, columns))
