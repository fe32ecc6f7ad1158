"""Signs of collapse: how much the features vary, and over how many directions. Needs no labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.registry import NoOptions
from copgen_fast.runtime import seeds

NEEDS_LABELS = False
_SAMPLE = 10_000  # images at most: far more than dimensions, and the cost grows with them


def evaluate(encoder: nn.Module, config: NoOptions, run: EvalRun) -> dict[str, float]:
    """Measure the features of test and training images together, a random sample of them where they are many.

    Returns:
        `feature_std` (0: all features are the same; 1: they point everywhere alike) and `rankme` (the effective
        number of directions, 1 .. D).
    """
    features = sample(encoder, run)
    return {"feature_std": feature_std(features), "rankme": rankme(features)}


def sample(encoder: nn.Module, run: EvalRun) -> Tensor:
    """Features [N, D] of test and training images on the run's device: of 10,000 drawn at random, or of all."""
    frozen, data = freeze(encoder, run), real_images(run)
    features = torch.cat([frozen.split_features(data, split).features for split in ("test", "train")])
    if len(features) > _SAMPLE:
        generator = seeds.generator(run.config.seed, "collapse")
        features = features[torch.randperm(len(features), generator=generator)[:_SAMPLE]]
    return features.to(run.device)


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of normalised features [N, D], times sqrt(D)."""
    std = F.normalize(features, dim=1).std(dim=0, correction=0)
    return std.mean().item() * math.sqrt(features.shape[1])


def rankme(features: Tensor) -> float:
    """exp of the entropy of the singular values of features [N, D], as shares of their sum (Garrido et al. 2023)."""
    return effective_number(squared_singular_values(features.double()).clamp_min(0).sqrt())


def squared_singular_values(features: Tensor) -> Tensor:
    """Those of features [N, D], ascending, by the smaller Gram matrix: rounding may leave some a little below 0."""
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    return torch.linalg.eigvalsh(gram)


def effective_number(values: Tensor) -> float:
    """exp of the entropy of shares that values [K], 0 or more, have of their sum: 1 if one has all, K if all agree."""
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()
