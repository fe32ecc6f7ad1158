"""PyTorch's conv2d, which the 3 x 3 convolution is compared with; and copies of networks that use it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.ops import Conv3x3
from copgen_fast.runtime.machine import version


def peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """torch.nn.functional.conv2d by its name, as a function of images [N, C, H, W] and a weight [O, C, 3, 3]."""
    return {f"PyTorch {version('torch')}, conv2d": lambda x, weight: F.conv2d(x, weight, padding=1)}


def by_pytorch(network: nn.Module) -> nn.Module:
    """A copy of the network in which every `Conv3x3` computes torch.nn.functional.conv2d."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, Conv3x3):
            layer.backend = "reference"
    return network
