"""The form of a frozen encoder that computes its features fastest: the same function, up to rounding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, ResNet

from copgen_fast.ops import tiles, winograd
from copgen_fast.ops.conv3x3.functional import is_conv3x3
from copgen_fast.runtime import devices

_VALUES = 2**21  # of the first convolution's outputs at once: they stay in a shared cache, and take no new pages


def inference_form(encoder: Callable[[Tensor], Tensor], precision: str = "fp32") -> Callable[[Tensor], Tensor]:
    """The same function, faster: a copy of torchvision's ResNet in eval mode. Anything else is returned as it is.

    Batch norms are folded into the convolutions before them, and images are stored channels last. On a CPU, 3 x 3
    convolutions of many channels take a quarter of the products (`ops.winograd`), and what comes before the second
    stage is computed for a few images at a time.

    Args:
        precision: with bf16, weights and activations are bfloat16 on a CPU that multiplies these; elsewhere its
            autocast is left to the caller.
    """
    if not isinstance(encoder, ResNet) or type(encoder)._forward_impl is not ResNet._forward_impl or encoder.training:
        return encoder
    encoder = copy.deepcopy(encoder)
    for module in list(encoder.modules()):
        children = list(module.named_children())
        for (before, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
    encoder = encoder.requires_grad_(False).to(memory_format=torch.channels_last)
    device = encoder.conv1.weight.device
    if device.type != "cpu":
        return encoder
    _for_cpus(encoder)
    if precision == "bf16" and devices.multiplies_bf16(device):
        for module in encoder.modules():
            if isinstance(module, FewerProducts):
                module.prepared = tiles.pairs(module.prepared)
        return encoder.bfloat16()
    return encoder


def _for_cpus(encoder: ResNet) -> None:
    for module in reversed(list(encoder.modules())):  # a block's convolutions before the block
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and _suits(conv):
                setattr(module, name, FewerProducts(conv))
        for name, block in module.named_children():
            if type(block) is BasicBlock and isinstance(block.conv2, FewerProducts):
                setattr(module, name, Block(block))
    first = [encoder.conv1, encoder.relu, encoder.maxpool]
    if isinstance(encoder.maxpool, nn.MaxPool2d):  # which commutes with a ReLU, and leaves it fewer values
        first[1:] = encoder.maxpool, encoder.relu
    encoder.conv1 = InParts(*first, encoder.layer1)
    encoder.relu = encoder.maxpool = encoder.layer1 = nn.Identity()


def _suits(conv: nn.Conv2d) -> bool:
    many = min(conv.in_channels, conv.out_channels) >= winograd.FEWEST
    return many and is_conv3x3(conv) and tiles.compiled(conv.weight)


class FewerProducts(nn.Module):
    """A 3 x 3 convolution by Winograd's algorithm (`ops.winograd`) where that is faster, else by PyTorch.

    PyTorch computes it for feature maps that fill too little of the tiles, where gradients are wanted, and where
    autocast changes the dtype.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("prepared", winograd.prepare(conv.weight))

    def forward(self, x: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """conv(x), or conv(x) + added; of that the ReLU with `relu`."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        able = x.dtype == self.prepared.dtype and tiles.fits(x, self.prepared)
        if wants_gradient or not able or winograd.fill(*x.shape[2:]) < winograd.LEAST_FILL:
            out = self.conv(x)
            out = out if added is None else out.add_(added)
            return out.relu_() if relu else out
        added = None if added is None else added.permute(0, 2, 3, 1)
        out = winograd.convolve(x.permute(0, 2, 3, 1), self.prepared, self.conv.bias, added, relu)
        return out.permute(0, 3, 1, 2)


class Block(nn.Module):
    """torchvision's BasicBlock without batch norms; the convolutions also add the residual and apply the ReLUs."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.downsample = block.conv1, block.conv2, block.downsample

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x, relu=True) if isinstance(self.conv1, FewerProducts) else self.conv1(x).relu_()
        return self.conv2(first, x if self.downsample is None else self.downsample(x), relu=True)


class InParts(nn.Module):
    """A convolution and the layers after it, computed for a few images at a time."""

    def __init__(self, conv: nn.Conv2d, *layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.layers = conv, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        values = self.conv.out_channels * x[0, 0].numel() // math.prod(self.conv.stride)
        # A bfloat16 network takes float32 images, too; another one what it is given.
        dtype = torch.bfloat16 if self.conv.weight.dtype == torch.bfloat16 else x.dtype
        parts = x.split(max(1, _VALUES // values))
        return torch.cat([self.layers(self.conv(part.to(dtype))) for part in parts])
