"""Handwritten digits: a small network fitted to scikit-learn's scans, with weights embedded in the package.

Made by `python -m copgen_fast.generators.fit.digits` from the training split of `copgen_fast.images.sets.digits` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._weights import load_into
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.options import Count

EMBEDDED = Path(__file__).parent / "weights" / "digits.safetensors"
LATENT_DIM = 64
SCAN = 8
SIZE = 32
KNEE = 0.95


@dataclass(frozen=True)
class Config:
    """Options of the digits' generator."""

    groups: tuple[Count, ...] = ()
    """Sizes of latent groups, which sum to 64, as 32,32; (): one. All of z acts on one layer: what they are good for is
    to let positives move in a part of its coordinates."""


class Residual(nn.Module):
    """h + W2 silu(W1 norm(h)). The norm is per sample, so that no image depends on its batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(self.norm(h))))


class DigitsGenerator(nn.Module):
    """Latents to grey 32x32 digits, the three channels equal; a `copgen_fast.generators.Generator`.

    The scans it was fitted to are 8x8, so it draws 8x8 and ends in their fixed bicubic upsampling.
    """

    latent_dim: int = LATENT_DIM
    classes: int = 0
    image_shape: tuple[int, int, int] = (3, SIZE, SIZE)
    upsampling: Tensor

    def __init__(self, width: int = 256, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.latent_groups = groups
        self.inward = nn.Linear(LATENT_DIM, width)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.outward = nn.Linear(width, SCAN * SCAN)
        self.register_buffer("upsampling", upsampling(SCAN), persistent=False)

    def scan(self, z: Tensor) -> Tensor:
        """Latents [N, 64] to scans [N, 8, 8] in [-1, 1], before upsampling."""
        hidden = self.blocks(self.inward(z))
        return self.outward(F.silu(hidden)).tanh().unflatten(1, (SCAN, SCAN))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, 64] of the weights' dtype to images [N, 3, 32, 32] in [-1, 1], differentiable in z.

        Raises:
            TypeError: z is no tensor, or of another dtype.
            ValueError: z has another shape, or labels are given.
        """
        expect_tensor("z", z, ("N", LATENT_DIM), {self.inward.weight.dtype})
        expect_labels(labels, len(z), self.classes)
        images = soft_limit(self.upsampling @ self.scan(z) @ self.upsampling.T)
        return images.unsqueeze(1).repeat(1, 3, 1, 1)


def soft_limit(values: Tensor) -> Tensor:
    """Bring the overshoot of bicubic interpolation into [-1, 1], leaving [-0.95, 0.95] as it is.

    Where the data are clamped this bends smoothly, so that overshooting pixels keep a gradient.
    """
    inside = values.clamp(-KNEE, KNEE)
    return inside + (1 - KNEE) * torch.tanh((values - inside) / (1 - KNEE))


def upsampling(side: int) -> Tensor:
    """The matrix [32, side] of bicubic interpolation along one axis, as of the real images.

    A product with it gives the same bits in every run, which interpolate's backward on CUDA does not.
    """
    identity = torch.eye(side).view(1, 1, side, side)
    return F.interpolate(identity, size=(SIZE, side), mode="bicubic", antialias=True).view(SIZE, side)


def build(weights: str | Path | None, config: Config) -> DigitsGenerator:
    """The generator with the embedded weights, or with those of a file of `generators.fit.digits`.

    Raises:
        UsageError: the file is missing, unreadable, or does not fit; the message names it and the fault.
    """
    generator = DigitsGenerator(groups=config.groups)
    path = Path(weights or EMBEDDED)
    remedy = "give a digits.safetensors of `python -m copgen_fast.generators.fit.digits --out DIR`"
    load_into(generator, "digits", path, remedy)
    generator.weights_file = path
    return generator
