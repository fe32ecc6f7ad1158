"""The form of a frozen encoder that computes its features fastest: the same function, up to rounding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import ResNet

from copgen_fast.ops import winograd

_FEWEST = 64  # channels in and out from which fewer products pay for the sums around them
_VALUES = 2**21  # of a stem's outputs at once: 8 MB stay in a shared cache, and take no new pages of memory


def inference_form(encoder: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, faster: a copy of a ResNet in eval mode. Anything else is returned as it is.

    Batch norms are folded into the convolutions before them, and images are stored channels last. On a CPU in float32
    or float64, 3 x 3 convolutions of many channels take a quarter of the products (`ops.winograd`), and what comes
    before the first pooling is computed for a few images at a time.
    """
    if not isinstance(encoder, ResNet) or encoder.training:
        return encoder
    encoder = copy.deepcopy(encoder)
    for module in list(encoder.modules()):
        children = list(module.named_children())
        for (before, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
    encoder = encoder.requires_grad_(False).to(memory_format=torch.channels_last)
    if encoder.conv1.weight.device.type == "cpu":
        _for_cpus(encoder)
    return encoder


def _for_cpus(encoder: ResNet) -> None:
    for module in list(encoder.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and _suits(conv):
                setattr(module, name, FewerProducts(conv))
    pool = encoder.maxpool
    if isinstance(pool, nn.MaxPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1):
        encoder.conv1, encoder.relu, encoder.maxpool = Stem(encoder.conv1), nn.Identity(), nn.Identity()


def _suits(conv: nn.Conv2d) -> bool:
    of_size = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    plain = of_size and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and min(conv.in_channels, conv.out_channels) >= _FEWEST and winograd.compiled(conv.weight)


class FewerProducts(nn.Module):
    """A 3 x 3 convolution by `ops.winograd` where that is exact to rounding, else as it was: under autocast or with
    gradients.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("prepared", winograd.prepare(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        if _differentiated(x) or torch.is_autocast_enabled("cpu"):
            return self.conv(x)
        return winograd.convolve(x.permute(0, 2, 3, 1), self.prepared, self.conv.bias).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """A convolution, the maximum of 3 x 3 pixels around every second one of its outputs, and a ReLU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if _differentiated(x):
            return F.max_pool2d(self.conv(x), 3, 2, 1).relu()
        values = self.conv.out_channels * x[0, 0].numel() // math.prod(self.conv.stride)
        parts = [self._part(part) for part in x.split(max(1, _VALUES // values))]
        return torch.cat(parts).relu_().permute(0, 3, 1, 2)

    def _part(self, x: Tensor) -> Tensor:
        images = self.conv(x).permute(0, 2, 3, 1)
        return torch.stack([_maxima(_maxima(image).transpose(0, 1)).transpose(0, 1) for image in images])


def _differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _maxima(x: Tensor) -> Tensor:
    """Maxima along dim 0 of every second value and its neighbours."""
    out, between = x[::2].clone(), x[1::2]
    for of, neighbours in ((out[: len(between)], between), (out[1:], between[: len(out) - 1])):
        torch.maximum(of, neighbours, out=of)
    return out
