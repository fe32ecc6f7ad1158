"""The exact rewrite of BigGAN-deep: the same function of z and the class in fewer operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
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


class FoldedBottleneck(nn.Module):
    """The package's GenBlock with its normalisations passed in: 1 x 1, 3 x 3, 3 x 3, 1 x 1.

    The shortcut has no weights: the first of x's channels, upsampled where the block does.
    """

    normalisations = 4

    def __init__(self, block: nn.Module, rewrites: Rewrites) -> None:
        super().__init__()
        middle, once = block.conv_1.in_channels, rewrites.spectral
        methods = (
            convolutions.POINTWISE,
            three_by_three(middle, middle, block.up_sample, rewrites),
            three_by_three(middle, middle, False, rewrites),
        )
        # The shift of the next normalisation holds these three's biases.
        self.inner = nn.ModuleList(
            FoldedConv(conv, method, once, None if rewrites.modulation else conv.bias)
            for conv, method in zip((block.conv_0, block.conv_1, block.conv_2), methods, strict=True)
        )
        self.last = FoldedConv(block.conv_3, convolutions.POINTWISE, once, block.conv_3.bias)
        self.upsampled, self.kept = block.up_sample, block.conv_3.out_channels
        self.shortcut_first = rewrites.shortcut

    def forward(self, x: Tensor, *normalise: Callable[..., Tensor]) -> Tensor:
        h = self.inner[0](normalise[0](x))  # x is read again, by the shortcut
        for conv, norm in zip(self.inner[1:], normalise[1:-1], strict=True):
            h = conv(norm(h, inplace=True))
        h, shortcut = normalise[-1](h, inplace=True), x[:, : self.kept]
        if self.upsampled and self.shortcut_first:
            return conv_add_upsampled(self.last, h, shortcut)
        return self.last(h).add_(F.interpolate(shortcut, scale_factor=2) if self.upsampled else shortcut)


class FoldedBigGANDeep(Folded):
    """Latents [N, L] and labels [N] to the images of a `BigGANDeep`, differentiable with respect to z alone."""

    def __init__(self, published: nn.Module, rewrites: Rewrites) -> None:
        network = published.network.generator
        layers, norms = {}, []
        for i, layer in enumerate(network.layers):
            if not published.is_block(layer):
                layers[f"layers.{i}"] = _attention(layer, rewrites)
                continue
            layers[f"layers.{i}"] = FoldedBottleneck(layer, rewrites)
            befores = (None, layer.conv_0.bias, layer.conv_1.bias, layer.conv_2.bias)
            for norm, before in zip((layer.bn_0, layer.bn_1, layer.bn_2, layer.bn_3), befores, strict=True):
                pair = (norm.scale, norm.offset)
                norms.append(Normalisation(pair, _place, _statistics(norm), before, rewrites.spectral))
        mean, var, epsilon = _statistics(network.bn)
        scale = network.bn.weight * (var + epsilon).rsqrt()
        last = (network.conv_to_rgb, scale, network.bn.bias - scale * mean)
        super().__init__(published, rewrites, network.gen_z, layers, norms, last)
        self.truncation = published.truncation
        self.register_buffer("embedding", published.network.embeddings.weight.detach().T.clone())

    def condition(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return torch.cat([self.truncation * z, F.embedding(labels, self.embedding)], 1)

    def seed_image(self, condition: Tensor) -> Tensor:
        """The linear layer puts channels last, as TensorFlow does."""
        return F.linear(condition, self.seed(), self.seed_bias).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)


def _attention(attention: nn.Module, rewrites: Rewrites) -> FoldedAttention:
    inward = (attention.snconv1x1_theta, attention.snconv1x1_phi, attention.snconv1x1_g)
    return FoldedAttention(inward, attention.snconv1x1_o_conv, attention.gamma, rewrites)


def _place(weight: Tensor) -> Tensor:
    """A condition's weight [C, K] as [K + 1, C], to multiply [condition, 1]."""
    return F.pad(weight.T, (0, 0, 0, 1))


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Mean and variance at the truncation (every row of the tables is the same) and epsilon."""
    return norm.running_means[0], norm.running_vars[0], norm.eps
