"""What the fitting scripts share: random warps, moving averages of weights, computing in one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def warp(images: Tensor, spread: tuple[float, float, float], strength: float = 1.0) -> Tensor:
    """Rotate, scale and shift each image [N, 1, S, S] at random, by torch's global generator; 0 is the background.

    Args:
        spread: standard deviations at strength 1, of radians, of the scale and of shifts in half sides.
    """
    n = len(images)
    turn, zoom, shift = spread
    angle, scale = torch.randn(n) * turn * strength, 1 + torch.randn(n) * zoom * strength
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = torch.randn(2, n) * shift * strength
    maps = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of parameters (not of buffers), whose decay starts low: (1 + step) / (10 + step)."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums depend on how many there are, and layers this small gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
