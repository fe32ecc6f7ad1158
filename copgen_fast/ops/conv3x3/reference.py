"""Definition of the 3 x 3 convolution in PyTorch operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Definition of `conv3x3`, without a bias."""
    return F.conv2d(x, weight, padding=1)
