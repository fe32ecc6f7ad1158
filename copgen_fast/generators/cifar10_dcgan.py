"""The small unconditional DCGAN for CIFAR-10 published as github.com/cx990203/gan-cifar (weights not included).

Transposed convolutions 3x3 -> 7x7 -> 15x15 -> 32x32, then 1x1; trained with z ~ N(0, I), 64-d.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._weights import load_into
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.registry import NoOptions


class Cifar10DCGAN(nn.Module):
    """z [N, 64] floating -> images [N, 3, 32, 32] in [-1, 1]. Parameter names are the published file's."""

    latent_dim = 64
    image_shape = (3, 32, 32)
    classes = 0
    prior = "normal"

    def __init__(self) -> None:
        super().__init__()
        self.up1 = _up(64, 256, kernel=3, stride=1)
        self.up2 = _up(256, 128, kernel=3, stride=2)
        self.up3 = _up(128, 64, kernel=3, stride=2)
        self.up4 = _up(64, 32, kernel=4, stride=2)
        self.out_layer = nn.Sequential(nn.ConvTranspose2d(32, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Sigmoid())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        seed = expect_tensor("z", z, ("N", self.latent_dim), {self.out_layer[0].weight.dtype})[:, :, None, None]
        expect_labels(labels, len(z), self.classes)
        return 2 * self.out_layer(self.up4(self.up3(self.up2(self.up1(seed))))) - 1


def _up(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.ConvTranspose2d(channels, out, kernel, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def build(weights: str | Path | None, config: NoOptions) -> Cifar10DCGAN:
    """Load the published state dict, .pth or .safetensors.

    Raises:
        UsageError: no file was named, it is not there, or it does not hold this network.
    """
    generator = Cifar10DCGAN()
    load_into(generator, "cifar10-dcgan", weights, "give the published file by --generator.weights FILE.pth")
    return generator
