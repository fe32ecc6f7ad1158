"""Batched augmentation, InfoNCE and conditional normalisation: differentiable ops that need torch only."""

from copgen_fast.ops.add_upsampled.functional import add_upsampled
from copgen_fast.ops.augment.functional import Augment, AugmentParams, AugmentPolicy, augment
from copgen_fast.ops.backend import backends
from copgen_fast.ops.cond_norm.functional import cond_norm
from copgen_fast.ops.conv3x3.functional import Conv3x3, conv3x3
from copgen_fast.ops.info_nce.functional import InfoNCELoss, InfoNCEStats, info_nce
from copgen_fast.ops.rand_augment.functional import RandAugmentParams, RandAugmentPolicy, rand_augment

__all__ = [
    "Augment",
    "AugmentParams",
    "AugmentPolicy",
    "Conv3x3",
    "InfoNCELoss",
    "InfoNCEStats",
    "RandAugmentParams",
    "RandAugmentPolicy",
    "add_upsampled",
    "augment",
    "backends",
    "cond_norm",
    "conv3x3",
    "info_nce",
    "rand_augment",
]
