"""Random views of a batch of images, replayable from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.ops import AugmentParams, AugmentPolicy, augment


def random_views(images: Tensor, policy: AugmentPolicy, generator: torch.Generator) -> Tensor:
    """One augmented, normalised view of every image, each with parameters of its own.

    Args:
        images: [N, 3, H, W], uint8 or floating in [0, 1]; the views are differentiable with respect to them.
        generator: draws the parameters, on its own device; a CPU one gives every device the same views.

    Returns:
        float32 [N, 3, H, W], channels last.
    """
    size = (images.shape[2], images.shape[3])
    params = AugmentParams.sample(len(images), size, policy, generator=generator)
    return augment(
        images,
        params.to(images.device),
        size,
        mean=policy.mean,
        std=policy.std,
        memory_format=torch.channels_last,
    )
