"""The residual GAN generator for 32x32 images of "Spectral Normalization for GANs" (Miyato et al. 2018, table 3).

Linear to 4x4, three residual blocks that double the side, then batch norm, ReLU, 3x3 convolution and tanh. The
paper's has width 256 and 128-d latents; here the weights file determines both.
Made by `python -m copgen_fast.generators.fit.resnet_gan`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._weights import with_remedy
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.registry import NoOptions
from copgen_fast.runtime import artifacts
from copgen_fast.runtime import weights as weights_file

LATENT_DIM = 128
SIZE = 32
_BOTTOM = 4
_REMEDY = (
    "make one by `python -m copgen_fast.generators.fit.resnet_gan --out DIR` and give its DIR/generator.safetensors "
    "by --generator.weights"
)


class UpBlock(nn.Module):
    """Residual block [N, W, H, H] -> [N, W, 2H, 2H]: batch norm, ReLU, nearest upsampling, conv; norm, ReLU, conv."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(_double(F.relu(self.norm1(x))))
        hidden = self.conv2(F.relu(self.norm2(hidden)))
        return hidden + _double(self.shortcut(x))  # a 1x1 convolution of four equal pixels: the order is free


class ResnetGAN(nn.Module):
    """Latents to colour images of 32 px; a `copgen_fast.generators.Generator`.

    In eval mode row i depends on z[i] alone; in training mode batch norm ties a batch together.
    """

    image_shape: tuple[int, int, int] = (3, SIZE, SIZE)
    classes: int = 0
    prior = "normal"

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = 256) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.linear = nn.Linear(latent_dim, width * _BOTTOM**2)
        self.blocks = nn.Sequential(*(UpBlock(width) for _ in range(3)))
        self.norm = nn.BatchNorm2d(width)
        self.to_rgb = nn.Conv2d(width, 3, 3, padding=1)
        self.apply(glorot)

    @property
    def width(self) -> int:
        """Channels of every block."""
        return self.to_rgb.in_channels

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] of the weights' dtype to images [N, 3, 32, 32] in [-1, 1], differentiable in z.

        Raises:
            TypeError: z is no tensor, or of another dtype.
            ValueError: z has another shape, or labels are given.
        """
        expect_tensor("z", z, ("N", self.latent_dim), {self.linear.weight.dtype})
        expect_labels(labels, len(z), self.classes)
        hidden = self.blocks(self.linear(z).unflatten(1, (self.width, _BOTTOM, _BOTTOM)))
        return self.to_rgb(F.relu(self.norm(hidden))).tanh()


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def glorot(module: nn.Module) -> None:
    """The paper's initialisation: Glorot uniform, in 3x3 convolutions sqrt(2) times as large; biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        wide = isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
        nn.init.xavier_uniform_(module.weight, math.sqrt(2) if wide else 1.0)
        nn.init.zeros_(module.bias)


def build(weights: str | Path | None, config: NoOptions) -> ResnetGAN:
    """The generator of a plain state dict, .safetensors or .pth, which determines width and latent_dim.

    Names may all carry the prefix `module.`, `generator.` or `_orig_mod.`, or several of them.

    Raises:
        UsageError: no file was named, or it is missing, unreadable, no state dict or another network's; the
            message names the file and the fault, and says how to make one.
    """
    with with_remedy("resnet-gan", weights, _REMEDY) as path:
        tensors = weights_file.load(path, ResnetGAN(width=1).state_dict().keys())
        generator = ResnetGAN(*_sizes(tensors, path))
        artifacts.load_strictly(generator, tensors, path)
    return generator


def _sizes(tensors: dict[str, Tensor], path: Path) -> tuple[int, int]:
    """(latent_dim, width), from the shape of the first layer."""
    first = tensors.get("linear.weight")
    if first is None:
        raise UsageError(f"{path} does not fit ResnetGAN: missing linear.weight (it holds {', '.join([*tensors][:3])})")
    if first.ndim != 2 or first.shape[0] % _BOTTOM**2 or 0 in first.shape:
        raise UsageError(f"{path} does not fit ResnetGAN: linear.weight is {list(first.shape)}, expected [16 W, L]")
    return first.shape[1], first.shape[0] // _BOTTOM**2
