"""The exact rewrite of BigBiGAN: the same function of z in fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.generators._folding import (
    Folded,
    FoldedAttention,
    FoldedConv,
    Normalisation,
    conv_add_upsampled,
    three_by_three,
)
from copgen_fast.generators._rewrites import Rewrites


class FoldedBlock(nn.Module):
    """A `bigbigan.Block` with its normalisations passed in."""

    normalisations = 2

    def __init__(self, block: nn.Module, rewrites: Rewrites) -> None:
        super().__init__()
        channels, out = block.conv1.in_channels, block.conv1.out_channels
        once = rewrites.spectral
        upsampled, plain = three_by_three(channels, out, True, rewrites), three_by_three(out, out, False, rewrites)
        # The second normalisation's shift holds conv1's bias.
        self.conv1 = FoldedConv(block.conv1, upsampled, once, None if rewrites.modulation else block.conv1.bias)
        # A constant upsampled is that constant: the shortcut's bias can join the main branch's.
        self.conv2 = FoldedConv(block.conv2, plain, once, block.conv2.bias + block.conv_sc.bias)
        self.conv_sc = FoldedConv(block.conv_sc, convolutions.POINTWISE, once)
        self.shortcut_first = rewrites.shortcut

    def forward(self, x: Tensor, first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Tensor:
        # Before x is overwritten.
        shortcut = self.conv_sc(x if self.shortcut_first else F.interpolate(x, scale_factor=2))
        h = self.conv1(first(x, inplace=True))
        h = second(h, inplace=True)
        return conv_add_upsampled(self.conv2, h, shortcut) if self.shortcut_first else self.conv2(h) + shortcut


class FoldedBigBiGAN(Folded):
    """Latents [N, L] to the images of a `BigBiGAN`, differentiable with respect to z alone."""

    def __init__(self, published: nn.Module, rewrites: Rewrites) -> None:
        layers, norms = {}, []
        for i, (block, *attentions) in enumerate(published.blocks):
            layers[f"blocks.{i}.0"] = FoldedBlock(block, rewrites)
            layers |= {f"blocks.{i}.1": _attention(attention, rewrites) for attention in attentions}
            place = partial(_place, published=published, chunk=i + 1)
            for norm, before in ((block.bn1, None), (block.bn2, block.conv1.bias)):
                statistics = (norm.stored_mean, norm.stored_var, norm.epsilon)
                norms.append(Normalisation((norm.gain, norm.bias), place, statistics, before, rewrites.spectral))
        last, _, conv = published.output_layer
        scale = last.gain * (last.stored_var + last.epsilon).rsqrt()
        shift = last.bias - scale * last.stored_mean
        super().__init__(published, rewrites, published.linear, layers, norms, (conv, scale, shift))
        self.chunk = published.chunk

    def condition(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return z

    def seed_image(self, condition: Tensor) -> Tensor:
        return F.linear(condition[:, : self.chunk], self.seed(), self.seed_bias).unflatten(1, (-1, 4, 4))


def _attention(attention: nn.Module, rewrites: Rewrites) -> FoldedAttention:
    return FoldedAttention((attention.theta, attention.phi, attention.g), attention.o, attention.gamma, rewrites)


def _place(weight: Tensor, published: nn.Module, chunk: int) -> Tensor:
    """A condition's weight [C, class + chunk] as [L + 1, C], to multiply [z, 1]: its class half is a constant row."""
    shared = published.shared.weight[0].to(weight)
    placed = weight.new_zeros(published.latent_dim + 1, len(weight))
    placed[published.chunk * chunk : published.chunk * (chunk + 1)] = weight[:, len(shared) :].T
    placed[-1] = weight[:, : len(shared)] @ shared
    return placed
