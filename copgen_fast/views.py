"""Random views of a batch of images: parameters drawn beforehand on the CPU, replayable from a seed, then applied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from copgen_fast.ops import AugmentParams, AugmentPolicy, augment


@record_function("augment")
def make_views(images: Tensor, params: AugmentParams, policy: AugmentPolicy) -> Tensor:
    """One augmented, normalised view of every image, by parameters drawn from `policy`. Draws nothing.

    Args:
        images: [N, 3, H, W], uint8 or floating in [0, 1]; the views are differentiable with respect to them.
        params: N rows, on the images' device.

    Returns:
        float32 [N, 3, H, W], channels last.
    """
    size = (images.shape[2], images.shape[3])
    return augment(images, params, size, mean=policy.mean, std=policy.std, memory_format=torch.channels_last)


def random_views(images: Tensor, policy: AugmentPolicy, generator: torch.Generator) -> Tensor:
    """`make_views` with parameters from `generator`, each image its own; a CPU one gives every device the same."""
    params = AugmentParams.sample(len(images), (images.shape[2], images.shape[3]), policy, generator=generator)
    return make_views(images, params.to(images.device), policy)
