"""BigBiGAN (Donahue and Simonyan 2019) at 128 pixels, as its public PyTorch port computes it.

This is the published form, layer by layer; `copgen_fast.generators.optimize` rewrites it to be fast. Parameter names,
shapes and constants are those of the port's 166 entries.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.generators._folded_bigbigan import FoldedBigBiGAN
from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._rewrites import ALL, Rewrites
from copgen_fast.generators._spectral import SpectralConv2d, SpectralLinear
from copgen_fast.generators._weights import find, load_into
from copgen_fast.ops.checks import expect_finite, expect_tensor
from copgen_fast.registry import NoOptions

FILE = "BigBiGAN_x1.pth"
SOURCE = "the public PyTorch port's BigBiGAN_x1.pth (release 0.0.1 of github.com/greeneggsandyaml/tmp)"
BOTTOM = 4


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, whose gain and bias are linear in a condition [N, C']."""

    epsilon = 1e-4

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.gain = SpectralLinear(condition, channels, bias=False)
        self.bias = SpectralLinear(condition, channels, bias=False)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = (1 + self.gain(condition))[:, :, None, None], self.bias(condition)[:, :, None, None]
        x = F.batch_norm(x, self.stored_mean, self.stored_var, eps=self.epsilon)
        return x * gain + bias


class BatchNorm(nn.Module):
    """Batch normalisation by stored statistics, with a gain and a bias."""

    epsilon = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.stored_mean, self.stored_var, self.gain, self.bias)
        return F.batch_norm(x, *statistics, eps=self.epsilon)


class Block(nn.Module):
    """Residual block, x [N, in, H, W] to [N, out, 2H, 2W]."""

    def __init__(self, channels: int, out: int, condition: int) -> None:
        super().__init__()
        self.bn1 = ConditionalBatchNorm(channels, condition)
        self.bn2 = ConditionalBatchNorm(out, condition)
        self.conv1 = SpectralConv2d(channels, out, 3, padding=1)
        self.conv2 = SpectralConv2d(out, out, 3, padding=1)
        self.conv_sc = SpectralConv2d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(self.bn1(x, condition).relu(), scale_factor=2)
        h = self.conv2(self.bn2(self.conv1(h), condition).relu())
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class Attention(nn.Module):
    """Self-attention x + gamma o(...) to keys and values that are max-pooled over 2 x 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, values = max(1, channels // 8), max(1, channels // 2)
        self.theta, self.phi = (SpectralConv2d(channels, inner, 1, bias=False) for _ in range(2))
        self.g = SpectralConv2d(channels, values, 1, bias=False)
        self.o = SpectralConv2d(values, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        queries = self.theta(x).flatten(2)
        keys, values = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        attention = (queries.transpose(1, 2) @ keys).softmax(2)
        found = (values @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.o(found)


class BigBiGAN(nn.Module):
    """z [N, L] to images [N, 3, R, R] in (-1, 1); L = 20 a block and 20 for the 4 x 4 seed: 120 at 128 pixels.

    Args:
        width: channels of the last block; the published has 96.
        resolution: R, 8 or more, a power of two. Channels halve from block to block, 16 times `width` at most.
        attention: the resolution after which the attention comes, if it is reached.
        embeddings: rows of the published class embedding, all equal: the model is unconditional.
    """

    classes = 0

    def __init__(
        self,
        width: int = 96,
        resolution: int = 128,
        *,
        attention: int = 64,
        chunk: int = 20,
        shared: int = 128,
        embeddings: int = 1000,
    ) -> None:
        super().__init__()
        count = int(math.log2(resolution // BOTTOM))
        if count < 1 or BOTTOM * 2**count != resolution:
            raise ValueError(f"resolution: expected a power of two from 8 on, got {resolution}")
        widths = [width * min(16, 2 ** (count - 1 - i)) for i in range(count)]
        widths = [min(2 * widths[0], 16 * width), *widths]
        self.latent_dim, self.image_shape, self.chunk = chunk * (count + 1), (3, resolution, resolution), chunk
        self.latent_groups = (chunk,) * (count + 1)
        self.shared = nn.Embedding(embeddings, shared)
        self.linear = SpectralLinear(chunk, BOTTOM * BOTTOM * widths[0])
        self.blocks = nn.ModuleList()
        for i in range(count):
            layers = [Block(widths[i], widths[i + 1], shared + chunk)]
            if BOTTOM * 2 ** (i + 1) == attention:
                layers.append(Attention(widths[i + 1]))
            self.blocks.append(nn.ModuleList(layers))
        last = SpectralConv2d(widths[-1], 3, 3, padding=1)
        self.output_layer = nn.Sequential(BatchNorm(widths[-1]), nn.ReLU(), last)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] of the weights' dtype to images; differentiable with respect to z.

        Raises:
            TypeError, ValueError: z of another dtype or shape; NaN or infinity (checked on the CPU alone);
                labels.
        """
        return deque(self.steps(z, labels), maxlen=1).pop()[1]

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and outputs of the layers, the images last."""
        expect_tensor("z", z, ("N", self.latent_dim), {self.linear.weight.dtype})
        expect_finite("z", z)
        expect_labels(labels, len(z), self.classes)
        seed, *chunks = z.split(self.chunk, dim=1)
        # The model has no classes: all rows of the embedding are alike.
        shared = self.shared(torch.zeros(len(z), dtype=torch.int64, device=z.device))
        x = self.linear(seed).unflatten(1, (-1, BOTTOM, BOTTOM))
        yield "seed", x
        for i, (layers, chunk) in enumerate(zip(self.blocks, chunks, strict=True)):
            condition = torch.cat([shared, chunk], 1)
            for j, layer in enumerate(layers):
                x = layer(x, condition)
                yield f"blocks.{i}.{j}", x
        yield "images", self.output_layer(x).tanh()

    def rewritten(self, rewrites: Rewrites = ALL) -> FoldedBigBiGAN:
        """The same function in fewer operations; see `copgen_fast.generators.optimize`."""
        return FoldedBigBiGAN(self, rewrites)


def build(weights: str | Path | None, config: NoOptions) -> BigBiGAN:
    """Load the published state dict, .pth or .safetensors.

    Raises:
        UsageError: it is not there, or does not hold this network.
    """
    path = find("bigbigan", weights, FILE, SOURCE)
    generator = BigBiGAN()
    load_into(generator, "bigbigan", path, f"give {SOURCE} by --generator.weights")
    generator.weights_file = path
    return generator
