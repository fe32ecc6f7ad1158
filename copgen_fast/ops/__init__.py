"""The importable part: batched augmentation and InfoNCE for any PyTorch program. Needs torch only."""

from copgen_fast.ops.augment import Augment, AugmentParams, AugmentPolicy, augment
from copgen_fast.ops.backend import backends
from copgen_fast.ops.info_nce import InfoNCELoss, InfoNCEStats, info_nce

__all__ = [
    "Augment",
    "AugmentParams",
    "AugmentPolicy",
    "InfoNCELoss",
    "InfoNCEStats",
    "augment",
    "backends",
    "info_nce",
]
