"""What a report draws images with: the run's generator, and sixteen anchors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast import generators
from copgen_fast.images import pictures
from copgen_fast.runtime import latents
from copgen_fast.stages.run import Run

COLUMNS = 16
SIDE = 80
"""Pixels of the longer side of an image on the page, at most."""
_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Scene:
    """A generator with the anchors that are shown.

    Attributes:
        z: latents [16, L] of the first pairs' anchors, on the CPU.
        seeds: theirs.
    """

    G: nn.Module
    device: torch.device
    z: Tensor
    seeds: list[int]

    def classes(self, count: int) -> Tensor | None:
        """Classes [count] of a conditional generator from the first to the last; None of another."""
        return torch.arange(count) * self.G.classes // count if self.G.classes else None

    @property
    def smaller(self) -> bool:
        """Whether images are shown smaller than the generator makes them."""
        return max(self.G.image_shape[1:]) > SIDE

    @property
    def quality(self) -> int:
        """Of JPEG files of the images: less where they are large, which takes half the bytes."""
        return pictures.QUALITIES[self.smaller]

    @torch.inference_mode()
    def images(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images float32 [N, 3, h, w] in [-1, 1] of latents [N, L], on the CPU, no larger than `SIDE` pixels."""
        drawn = []
        for rows in torch.arange(len(z)).split(_AT_ONCE):
            y = None if labels is None else labels[rows].to(self.device)
            drawn.append(_shrunk(self.G(z[rows].to(self.device), y).float()).cpu())
        return torch.cat(drawn)


def open_scene(run: Run) -> Scene:
    """The run's generator, in float32, and its first anchors."""
    config = run.config
    G = generators.load(dataclasses.replace(config.generator, level="exact", checkpoint=False), run.device)
    seeds = list(range(config.pairs.start_seed, config.pairs.start_seed + COLUMNS))
    return Scene(G, run.device, latents.each(G.sample, seeds), seeds)


def _shrunk(images: Tensor) -> Tensor:
    scale = SIDE / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
