"""Image grids as PNG files, and pictures for web pages in few bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime import artifacts

QUALITIES = (88, 75, 60, 45, 30)
"""Of JPEG files, the best one first."""


def grid(images: Tensor, columns: int, padding: int = 2) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] row by row with `columns` to a row, white pixels around them.

    Raises:
        TypeError, ValueError: images of another dtype or shape.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    images = images.detach().float().cpu().clamp(-1, 1).add(1).div(2)
    pixels = make_grid(images, nrow=columns, padding=padding, pad_value=1.0)
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())


def grid_png(images: Tensor, columns: int) -> bytes:
    """PNG bytes of `grid`."""
    return _encoded(grid(images, columns), format="PNG")


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write `grid_png` to a file."""
    artifacts.write_bytes(path, grid_png(images, columns))


def smallest(picture: Image.Image, quality: int = QUALITIES[0], limit: int | None = None) -> bytes:
    """A picture as a PNG file or a JPEG file of a quality, whichever is smaller; above `limit` bytes one of less."""
    pixels = np.asarray(picture.convert("RGB"))
    grey = (pixels == pixels[..., :1]).all()
    picture = Image.fromarray(pixels[..., 0] if grey else pixels)
    best = min(_encoded(picture, format="PNG"), _jpeg(picture, quality), key=len)
    for lower in (lower for lower in QUALITIES if lower < quality):
        if limit is None or len(best) <= limit:
            break
        best = _jpeg(picture, lower)
    return best


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    # In the best quality colours are as sharp as brightness, for images of few pixels.
    subsampling = "4:4:4" if quality == QUALITIES[0] else "4:2:0"
    return _encoded(picture, format="JPEG", quality=quality, subsampling=subsampling)


def _encoded(picture: Image.Image, **options: str | int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()
