"""RandAugment as a PyTorch operator over C++, for `torch.compile`; without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.backend import load
from copgen_fast.ops.library import operator


@operator("rand_augment")
def compiled_rand_augment(images: Tensor, operation: Tensor, argument: Tensor, cubic: Tensor, affine: Tensor) -> Tensor:
    """Views [N, 3, h, w] of contiguous float32 or float64 images; `affine` from `params.matrices`."""
    views = torch.empty_like(images)
    if images.numel():
        rows = (tensor.contiguous() for tensor in (operation, argument, cubic, affine))
        load("cpp", "rand_augment").rand_augment(images, *rows, views)
    return views


register_fake(compiled_rand_augment, lambda images, *_: torch.empty_like(images))
