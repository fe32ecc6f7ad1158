"""The peer of the 3 x 3 convolution, PyTorch's own; and copies of networks that compute by it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.ops import Conv3x3
from copgen_fast.runtime.machine import version


def peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """It takes images [N, C, H, W] and a weight [O, C, 3, 3]."""
    return {f"PyTorch {version('torch')}, conv2d": lambda x, weight: F.conv2d(x, weight, padding=1)}


def by_pytorch(network: nn.Module) -> nn.Module:
    """A copy whose convolutions are all PyTorch's, as in the code that a step is compared with."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, Conv3x3):
            layer.backend = "reference"
    return network
