"""StyleGAN2 (Karras et al. 2020) with skip outputs, of any size and width, as StyleGAN2-ADA's release computes it.

This is the published form, layer by layer, by the names of the release's state dicts; `copgen_fast.generators.optimize`
rewrites it to be fast. Noise is the stored constant or none, so that an image depends on its latent alone; images are
clamped to [-1, 1], as the release does when it saves them.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.generators._folded_stylegan2 import FoldedStyleGAN2
from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._rewrites import ALL, Rewrites
from copgen_fast.generators._stylegan2_files import read_weights
from copgen_fast.generators._stylegan2_layers import Mapping, Shape, Synthesis
from copgen_fast.generators._weights import with_remedy
from copgen_fast.ops.checks import expect_finite, expect_tensor
from copgen_fast.options import Range
from copgen_fast.runtime import artifacts, latents

REMEDY = "give a .pkl of StyleGAN2-ADA's release or a .pt of rosinality's port by --generator.weights FILE"

_BLOCK = 16  # latents mapped at once: 0.2 ms each on a core (8 layers of 512), 0.9 ms alone


@dataclass(frozen=True)
class Config:
    """Options of stylegan2."""

    space: Literal["z", "w"] = "z"
    """Latents: z is the mapping network's input; w its output, one for each layer, which are latent groups."""

    psi: Annotated[float, Range(0, 1)] = 1.0
    """Truncation: w is moved towards its average, 1 not at all. In space w, that is how latents are drawn."""

    noise: Literal["const", "none"] = "const"
    """Noise of the layers: that stored with the weights, the same for each image, or none."""


class StyleGAN2(nn.Module):
    """Latents to images [N, 3, R, R] in [-1, 1].

    In space z latents are [N, L], in space w [N, K * W]: a w for each of K layers, which are the latent groups. A
    layer here is a convolution; the last is the last output's, the others' share the w of the convolution that follows.

    Args:
        shape: sizes of the network.
        config: space, truncation and noise.
    """

    prior = "normal"

    def __init__(self, shape: Shape, config: Config = Config()) -> None:
        super().__init__()
        self.shape, self.config = shape, config
        self.mapping = Mapping(shape)
        self.synthesis = Synthesis(shape)
        self.classes, self.layers, self.w_dim = shape.classes, 2 * len(shape.channels), shape.mapping[-1]
        self.image_shape = (3, self.synthesis.sides[-1], self.synthesis.sides[-1])
        self.latent_dim, self.latent_groups = shape.z_dim, ()
        if config.space == "w":
            if self.classes:
                raise UsageError("option space=w of stylegan2: these weights have classes, on which w depends: take z")
            self.latent_dim, self.latent_groups = self.layers * self.w_dim, (self.w_dim,) * self.layers
            self.sample, self.sample_each = self._sample_w, self._sample_each_w
        if config.noise == "none":
            for block in self.synthesis.blocks:
                for conv in block.convs:
                    conv.noisy = False

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, latent_dim] of the weights' dtype to images; differentiable with respect to them.

        Raises:
            TypeError, ValueError: latents of another dtype or shape; NaN, infinity (checked on the CPU alone); labels.
        """
        return deque(self.steps(z, labels), maxlen=1).pop()[1]

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and outputs of the layers, the images last."""
        ws = self.layers_w(*self.checked(z, labels))
        yield "mapping", ws
        if not len(z):  # which grouped convolutions refuse
            yield "images", z.new_zeros(0, *self.image_shape)
            return
        image = z
        for name, image in self.synthesis.steps(ws):
            yield name, image
        yield "images", image.clamp(-1, 1).expand(-1, 3, -1, -1)

    def checked(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latents and labels, checked."""
        expect_tensor("z", z, ("N", self.latent_dim), {self.mapping.fc0.weight.dtype})
        expect_finite("z", z)
        return z, expect_labels(labels, len(z), self.classes)

    def layers_w(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """w of every layer, [N, K, W]."""
        if self.config.space == "w":
            return z.unflatten(1, (self.layers, self.w_dim))
        return self.mapping(z, labels, self.config.psi)[:, None].expand(-1, self.layers, -1)

    def rewritten(self, rewrites: Rewrites = ALL) -> FoldedStyleGAN2:
        """The same function in fewer operations; see `copgen_fast.generators.optimize`."""
        return FoldedStyleGAN2(self, rewrites)

    def _sample_w(self, seed: int, count: int) -> Tensor:
        """Latents of space w, float32 [count, latent_dim]: w of normal z, truncated by psi, the same for all layers."""
        return self._w_of(latents.sample("normal", seed, (count, self.shape.z_dim)))

    def _sample_each_w(self, seeds: Sequence[int]) -> Tensor:
        return self._w_of(latents.sample_each("normal", seeds, self.shape.z_dim))

    @torch.no_grad()
    def _w_of(self, z: Tensor) -> Tensor:
        # Products of one size, so that a latent's bits don't depend on how many are drawn.
        blocks = F.pad(z.double(), (0, 0, 0, -len(z) % _BLOCK)).split(_BLOCK)
        found = torch.cat([self._mapping64(block, None, self.config.psi) for block in blocks])
        return found[: len(z), None].float().expand(-1, self.layers, -1).flatten(1)

    @functools.cached_property
    def _mapping64(self) -> Mapping:
        """The mapping network on the CPU in float64, so that the same seed gives the same latents on any device."""
        return copy.deepcopy(self.mapping).cpu().double()


def build(weights: str | Path | None, config: Config) -> StyleGAN2:
    """Load NVIDIA's .pkl, rosinality's .pt or a state dict of either, which determines all sizes.

    Raises:
        UsageError: no file was named, it is missing, damaged or refused, or it does not hold this network.
    """
    with with_remedy("stylegan2", weights, REMEDY) as path:
        shape, tensors = read_weights(path)
        generator = StyleGAN2(shape, config)
        artifacts.load_strictly(generator, tensors, path)
    return generator
