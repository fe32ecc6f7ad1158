"""Named augmentation policies, as data, and the views they make of a batch of images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from copgen_fast.errors import UsageError
from copgen_fast.ops import AugmentParams, AugmentPolicy, RandAugmentPolicy, augment

_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "gray": 0.2}


def simclr_paper(strength: float) -> AugmentPolicy:
    """SimCLR's own policy at a colour strength (arXiv:2002.05709, appendix A; 1 for ImageNet, 0.5 for CIFAR-10)."""
    return AugmentPolicy(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        jitter=0.8,
        gray=0.2,
        blur=0.5,
    )


_INFOMIN = replace(simclr_paper(1.0), crop_scale=(0.2, 1.0))

# The first four are the reference implementation's (navigator and pretraining); no-color also trains its probes.
POLICIES: dict[str, AugmentPolicy] = {
    "simclr": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5, **_JITTER),
    "no-color": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5),
    "no-crop": AugmentPolicy(flip=0.5, **_JITTER),
    "none": AugmentPolicy(),
    "simclr-paper": simclr_paper(1.0),
    # "What makes for good views" (arXiv:2005.10243, section 4.3), without the jigsaw branch, which changes the network.
    # Without RandAugment: infomin-basic.
    "infomin": replace(_INFOMIN, rand_augment=RandAugmentPolicy()),
    "infomin-basic": _INFOMIN,
    # The second of BYOL's two policies, the one that solarises (arXiv:2006.07733, appendix B).
    "byol": AugmentPolicy(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter=0.8,
        gray=0.2,
        blur=0.1,
        solarize=0.2,
    ),
    # Small grey scans: a mirrored digit is another sign, and there is no colour to change.
    "digits": AugmentPolicy(
        crop_scale=(0.4, 1.0),
        brightness=0.4,
        contrast=0.4,
        jitter=0.8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}


def get(name: str) -> AugmentPolicy:
    """The policy called `name`.

    Raises:
        UsageError: no such policy; the message lists those there are.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown augmentation {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name]


@record_function("augment")
def make_views(images: Tensor, params: AugmentParams, policy: AugmentPolicy, check_range: bool | None = None) -> Tensor:
    """One augmented, normalised view of every image, by parameters drawn from `policy`. Draws nothing.

    Args:
        images: [N, 3, H, W], uint8 or floating in [0, 1]; the views are differentiable with respect to them.
        params: N rows, on the images' device.
        check_range: as `augment` takes it.

    Returns:
        [N, 3, H, W], channels last; float32, or float64 where the images are.
    """
    size = (images.shape[2], images.shape[3])
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    form = {"memory_format": torch.channels_last, "out_dtype": dtype, "check_range": check_range}
    return augment(images, params, size, mean=policy.mean, std=policy.std, **form)


def random_views(images: Tensor, policy: AugmentPolicy, generator: torch.Generator) -> Tensor:
    """`make_views` with parameters from `generator`, each image its own; a CPU one gives every device the same."""
    params = AugmentParams.sample(len(images), (images.shape[2], images.shape[3]), policy, generator=generator)
    return make_views(images, params.to(images.device), policy)
