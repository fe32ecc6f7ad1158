"""The peer of the 3 x 3 convolution: PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from copgen_fast.runtime.machine import version


def peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """It takes images [N, C, H, W] and a weight [O, C, 3, 3]."""
    return {f"PyTorch {version('torch')}, conv2d": lambda x, weight: F.conv2d(x, weight, padding=1)}
