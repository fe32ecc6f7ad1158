"""Layers of StyleGAN2 (Karras et al. 2020) in their published form, by the names of StyleGAN2-ADA's state dicts.

Weights are stored as trained, and each layer multiplies its own by 1 / sqrt(inputs) and a learning rate's multiplier
(equalised learning rates). A convolution's inputs are scaled by styles, and its outputs normalised to unit variance
(modulation and demodulation, section 2.2), by weights made for every image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-8
SLOPE, GAIN = 0.2, math.sqrt(2)
"""Of the leaky ReLU; the gain keeps the variance."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a network.

    Attributes:
        channels: of the blocks at 4, 8, 16, ... pixels.
        mapping: output features of the mapping network's layers, the last of which is the length of w.
        colours: 3, or 1 for grey images.
        noise: whether layers have noise.
        clamp: limit of every layer's outputs; None: there is none.
        half_blocks: how many of the last blocks level half computes in half precision.
        rate: the learning rate of the mapping network, as a multiple of the others'.
        embedding: length of the classes' embedding; None: that of w.
    """

    channels: tuple[int, ...]
    z_dim: int = 512
    mapping: tuple[int, ...] = (512,) * 8
    classes: int = 0
    colours: int = 3
    noise: bool = True
    clamp: float | None = None
    half_blocks: int = 4
    rate: float = 0.01
    embedding: int | None = None


def leaky(x: Tensor) -> Tensor:
    """The leaky ReLU, scaled to keep the variance."""
    return F.leaky_relu(x, SLOPE) * GAIN


def clamped(x: Tensor, limit: float | None) -> Tensor:
    """x within [-limit, limit]."""
    return x if limit is None else x.clamp(-limit, limit)


def second_moment_normalised(x: Tensor) -> Tensor:
    """Rows [N, L] scaled to mean square 1."""
    return x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()


def low_pass_filter() -> Tensor:
    """[1, 3, 3, 1] along both axes, [4, 4], of sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return taps.outer(taps) / 64


def upsampled(image: Tensor, taps: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C, 2H, 2W]: zeros between the pixels, then the filter `taps` [4, 4] times 4."""
    channels = image.shape[1]
    weight = (4 * taps).expand(channels, 1, 4, 4)
    return F.conv_transpose2d(image, weight, stride=2, padding=1, groups=channels)


def smoothed(x: Tensor, taps: Tensor) -> Tensor:
    """The filter `taps` [4, 4] times 4 on a transposed convolution's [N, C, 2H + 1, 2W + 1]: [N, C, 2H, 2W]."""
    channels = x.shape[1]
    return F.conv2d(x, (4 * taps.flip(0, 1)).expand(channels, 1, 4, 4), padding=1, groups=channels)


class Dense(nn.Module):
    """A linear layer with an equalised learning rate, `rate` times that of others."""

    def __init__(self, features: int, out: int, rate: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.randn(out, features) / rate)
        self.bias = nn.Parameter(torch.full((out,), bias))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as they act."""
        return self.weight * (self.rate / math.sqrt(self.weight.shape[1])), self.bias * self.rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.scaled())


class Mapping(nn.Module):
    """z [N, L] (and labels) to w [N, W]; `w_avg` is the average w."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers, w_dim = len(shape.mapping), shape.mapping[-1]
        embedded = (shape.embedding or w_dim) if shape.classes else 0
        if shape.classes:
            self.embed = Dense(shape.classes, embedded)
        sizes = (shape.z_dim + embedded, *shape.mapping)
        for i in range(self.layers):
            setattr(self, f"fc{i}", Dense(sizes[i], sizes[i + 1], shape.rate))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor, labels: Tensor | None = None, psi: float = 1.0) -> Tensor:
        x = second_moment_normalised(z)
        if labels is not None:
            one_hot = F.one_hot(labels, self.embed.weight.shape[1]).to(z.dtype)
            x = torch.cat([x, second_moment_normalised(self.embed(one_hot))], 1)
        for i in range(self.layers):
            x = leaky(getattr(self, f"fc{i}")(x))
        return x if psi == 1 else self.w_avg.lerp(x, psi)


class StyledConv(nn.Module):
    """A modulated 3 x 3 convolution with demodulation, noise, bias and leaky ReLU, upsampling first if `up`.

    Args:
        noise: whether the layer has noise.
        clamp: outputs are clamped to [-clamp, clamp], as float16 needs it in training; None: they are not.
    """

    def __init__(
        self, channels: int, out: int, w_dim: int, side: int, up: bool, noise: bool, clamp: float | None
    ) -> None:
        super().__init__()
        self.side, self.up, self.clamp, self.noisy = side, up, clamp, noise
        self.affine = Dense(w_dim, channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out))
        self.register_buffer("resample_filter", low_pass_filter())
        if noise:
            self.register_buffer("noise_const", torch.randn(side, side))
            self.noise_strength = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        n, _, height, width = x.shape
        out, channels = self.weight.shape[:2]
        weight = self.weight * self.affine(w)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + EPSILON).rsqrt()
        x = x.reshape(1, n * channels, height, width)
        if self.up:
            weight = weight.transpose(1, 2).reshape(n * channels, out, 3, 3)
            x = F.conv_transpose2d(x, weight, stride=2, groups=n)
            x = smoothed(x.view(n, out, *x.shape[2:]), self.resample_filter)
        else:
            x = F.conv2d(x, weight.view(n * out, channels, 3, 3), padding=1, groups=n).view(n, out, height, width)
        if self.noisy:
            x = x + self.noise_const * self.noise_strength
        return clamped(leaky(x + self.bias[:, None, None]), self.clamp)


class ToRGB(nn.Module):
    """A modulated 1 x 1 convolution to colours, without demodulation."""

    def __init__(self, channels: int, out: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Dense(w_dim, channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w) / math.sqrt(self.weight.shape[1])
        weight = self.weight.flatten(1) * styles[:, None]
        y = (weight @ x.flatten(2)).unflatten(2, x.shape[2:]) + self.bias[:, None, None]
        return clamped(y, self.clamp)


class Block(nn.Module):
    """The layers at one side: an upsampling and a plain convolution, and what they add to the image.

    Args:
        channels: of the block before; 0: this is the first, which begins with a constant.
    """

    def __init__(
        self, channels: int, out: int, w_dim: int, side: int, colours: int, noise: bool, clamp: float | None
    ) -> None:
        super().__init__()
        self.register_buffer("resample_filter", low_pass_filter())
        if channels:
            self.conv0 = StyledConv(channels, out, w_dim, side, True, noise, clamp)
        else:
            self.const = nn.Parameter(torch.randn(out, side, side))
        self.conv1 = StyledConv(out, out, w_dim, side, False, noise, clamp)
        self.torgb = ToRGB(out, colours, w_dim, clamp)

    @property
    def convs(self) -> list[StyledConv]:
        """Its convolutions, in order."""
        return [self.conv0, self.conv1] if hasattr(self, "conv0") else [self.conv1]


class Synthesis(nn.Module):
    """w of every layer [N, K, W] to images, by blocks `b4`, `b8`, ...; K = 2 blocks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sides = [4 * 2**i for i in range(len(shape.channels))]
        before = 0
        for side, out in zip(self.sides, shape.channels, strict=True):
            block = Block(before, out, shape.mapping[-1], side, shape.colours, shape.noise, shape.clamp)
            setattr(self, f"b{side}", block)
            before = out

    @property
    def blocks(self) -> list[Block]:
        """In order of their sides."""
        return [getattr(self, f"b{side}") for side in self.sides]

    def steps(self, ws: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and outputs of the convolutions and of each block's image so far."""
        x, image, layer = self.b4.const.expand(len(ws), -1, -1, -1), None, 0
        for side, block in zip(self.sides, self.blocks, strict=True):
            for conv in block.convs:
                x = conv(x, ws[:, layer])
                yield f"b{side}.conv{'0' if conv.up else '1'}", x
                layer += 1
            added = block.torgb(x, ws[:, layer])  # which shares its w with the next block's first convolution
            image = added if image is None else upsampled(image, block.resample_filter) + added
            yield f"b{side}.torgb", image
