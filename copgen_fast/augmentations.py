"""Named augmentation policies, as data. `copgen_fast.ops.augment` applies them."""

from __future__ import annotations

from copgen_fast.errors import UsageError
from copgen_fast.ops import AugmentPolicy

_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "gray": 0.2}

# The first four are the reference implementation's (navigator and pretraining); no-color also trains its probes.
POLICIES: dict[str, AugmentPolicy] = {
    "simclr": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5, **_JITTER),
    "no-color": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5),
    "no-crop": AugmentPolicy(flip=0.5, **_JITTER),
    "none": AugmentPolicy(),
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
