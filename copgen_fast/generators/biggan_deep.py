"""BigGAN-deep (Brock et al. 2019) of ImageNet's classes, as the package pytorch-pretrained-biggan computes it.

128, 256 or 512 pixels, as the weights' config.json says: the package itself knows the layers of 128 alone.
This is the published form, by the package's modules; `copgen_fast.generators.optimize` rewrites it to be fast. It
differs from the package in two points:

- Statistics. Its normalisations hold 51 rows of them, for truncations 0, 0.02, .. 1. Between two rows the package swaps
  their weights: at 0.405 it takes one quarter of row 20 and three of row 21, where it is the other way round. By
  rounding, that also makes it take a neighbour's row at 0.14, 0.28, 0.56, 0.58 and 0.94. Ours is linear
  interpolation; at the other tabulated truncations, 1 among them, both are the same.
- Weights. It downloads them; here they are read from a folder, by a loader that runs no pickled code, and all must fit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import UsageError, in_one_line
from copgen_fast.generators._folded_biggan import FoldedBigGANDeep
from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._rewrites import ALL, Rewrites
from copgen_fast.generators._weights import find, load_into
from copgen_fast.ops.checks import expect_finite, expect_tensor
from copgen_fast.options import Range

FOLDER = "biggan-deep-128"
CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
SOURCE = (
    "a folder with the two files of biggan-deep-128, -256 or -512, from where PRETRAINED_CONFIG_ARCHIVE_MAP and "
    "PRETRAINED_MODEL_ARCHIVE_MAP of pytorch_pretrained_biggan.model say, as config.json and pytorch_model.bin"
)


@dataclass(frozen=True)
class Config:
    """Options of biggan-deep."""

    truncation: Annotated[float, Range(1e-3, 1)] = 1.0
    """More than 0 and at most 1: scales its latents and chooses its statistics."""


class BigGANDeep(nn.Module):
    """z [N, L] and labels [N] to images [N, 3, R, R] in (-1, 1); L = 128 and 1000 classes as published.

    Args:
        network: the package's BigGAN; its tables of statistics are overwritten.
        truncation: in (0, 1]; scales latents to truncation * z, and chooses the statistics of such latents.

    Raises:
        ValueError: a truncation out of range.
    """

    def __init__(self, network: nn.Module, truncation: float = 1.0) -> None:
        super().__init__()
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation: expected more than 0 and at most 1, got {truncation}")
        config = network.config
        side = 4 * 2 ** sum(bool(upsampled) for upsampled, _, _ in config.layers)
        self.latent_dim, self.image_shape, self.classes = config.z_dim, (3, side, side), config.num_classes
        self.network, self.truncation = network, truncation
        for module in network.modules():
            if hasattr(module, "running_means"):
                for table in (module.running_means, module.running_vars):
                    # Every row, so that whichever the package reads is right.
                    table.copy_(statistics(table, truncation).expand_as(table).clone())

    @staticmethod
    def is_block(layer: nn.Module) -> bool:
        """Whether a layer is a residual block rather than an attention."""
        return hasattr(layer, "conv_0")

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] of the weights' dtype and labels int64 [N] to images; differentiable with respect to z.

        Raises:
            TypeError, ValueError: z or labels of another dtype or shape, no labels; NaN, infinity or a label out of
                range (checked on the CPU alone).
        """
        return deque(self.steps(z, labels), maxlen=1).pop()[1]

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and outputs of the layers, the images last."""
        embeddings, network = self.network.embeddings, self.network.generator
        expect_tensor("z", z, ("N", self.latent_dim), {embeddings.weight.dtype})
        expect_finite("z", z)
        labels = expect_labels(labels, len(z), self.classes)
        embedded = embeddings(F.one_hot(labels, self.classes).to(z.dtype))
        condition = torch.cat([self.truncation * z, embedded], 1)
        x = network.gen_z(condition).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2).contiguous()
        yield "seed", x
        for i, layer in enumerate(network.layers):
            x = layer(x, condition, self.truncation) if self.is_block(layer) else layer(x)
            yield f"layers.{i}", x
        x = network.conv_to_rgb(network.relu(network.bn(x, self.truncation)))
        yield "images", network.tanh(x[:, :3])  # of the 128 channels that the convolution puts out

    def rewritten(self, rewrites: Rewrites = ALL) -> FoldedBigGANDeep:
        """The same function in fewer operations; see `copgen_fast.generators.optimize`."""
        return FoldedBigGANDeep(self, rewrites)


def statistics(table: Tensor, truncation: float) -> Tensor:
    """Row [C] of a table [S, C] for truncations 0, 1 / (S - 1), .. 1, interpolated linearly."""
    place = truncation * (len(table) - 1)
    lower = min(math.floor(place), len(table) - 2)
    return torch.lerp(table[lower], table[lower + 1], place - lower)


def build(weights: str | Path | None, config: Config) -> BigGANDeep:
    """Load the folder of a published model; nothing is ever downloaded.

    Raises:
        UsageError: it or the package is not there, its config describes no BigGAN-deep, or a truncation out of range.
        CorruptArtifactError: the weights are not those of the network that it describes.
    """
    folder = find("biggan-deep", weights, FOLDER, SOURCE)
    network = _network(folder / CONFIG)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"{folder} holds no {' or '.join(WEIGHTS)}: give {SOURCE} by --generator.weights")
    load_into(network, "biggan-deep", path, f"give {SOURCE} by --generator.weights")
    try:
        generator = BigGANDeep(network, config.truncation)
    except ValueError as error:
        raise UsageError(f"generator.options: {error}") from error
    generator.weights_file = path
    return generator


def _network(path: Path) -> nn.Module:
    """The package's network of a config.json, with weights yet to be loaded."""
    try:
        from pytorch_pretrained_biggan import BigGAN, BigGANConfig
    except ImportError as error:
        raise UsageError(
            "generator biggan-deep needs the package pytorch-pretrained-biggan: pip install 'copgen_fast[biggan]'"
        ) from error
    if not path.is_file():
        raise UsageError(f"{path} is not there: give {SOURCE} by --generator.weights")
    try:
        return BigGAN(BigGANConfig.from_json_file(path))
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} describes no BigGAN-deep ({in_one_line(error)})") from error
