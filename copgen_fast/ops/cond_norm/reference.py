"""Definition of the conditional normalisation in PyTorch operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layout_of(x: Tensor) -> torch.memory_format:
    """Memory format of the result: channels_last where the channels of x are adjacent."""
    adjacent = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if adjacent else torch.contiguous_format


def cond_norm(x: Tensor, scale: Tensor, shift: Tensor, upsample: bool) -> Tensor:
    """Definition of `cond_norm`; scales and shifts [N, C] have the dtype of the arithmetic."""
    y = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None]).relu_().to(x.dtype)
    if upsample:  # interpolate takes no empty images
        y = F.interpolate(y, scale_factor=2) if y.numel() else y.repeat(1, 1, 2, 2)
    return y.contiguous(memory_format=layout_of(x))
