"""Random views of a batch of images, replayable from a key."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast import seeds
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment


def random_views(images: Tensor, policy: AugmentPolicy, *key: seeds.Key) -> Tensor:
    """One augmented, normalised view of every image, each with parameters of its own drawn from `key`.

    Args:
        images: [N, 3, S, S], uint8 or floating in [0, 1]; the views are differentiable with respect to them.

    Returns:
        float32 [N, 3, S, S], channels last.
    """
    size = (images.shape[2], images.shape[3])
    params = AugmentParams.sample(len(images), size, policy, generator=seeds.generator(*key))
    return augment(
        images,
        params.to(images.device),
        images.shape[2],
        mean=policy.mean,
        std=policy.std,
        memory_format=torch.channels_last,
    )
