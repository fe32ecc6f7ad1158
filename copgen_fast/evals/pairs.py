"""What an encoder makes of pairs: how near the positives are, and whether they keep the anchors' classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.evals._frozen import EvalRun, LabelledFeatures, freeze, real_images
from copgen_fast.evals._pairs import PairFeatures, pair_features
from copgen_fast.evals.linear import class_scores
from copgen_fast.options import Place, Range, check_ranges
from copgen_fast.runtime import seeds

NEEDS_LABELS, NEEDS_PAIRS = False, True
_CHUNK = 1024  # rows of an N x N matrix that are in memory at once
_FITTED = 20_000  # real images at most that the classifier is fitted to
_QUANTILES = (5, 50, 95)


@dataclass(frozen=True)
class Config:
    """Options of the measures of pairs."""

    folder: Place | None = None
    """Pairs to measure; None: those that the encoder was pretrained on (baselines: those of the first source)."""
    count: Annotated[int, Range(2)] = 10_000
    """Pairs at most, drawn at random."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Measure the pairs in the encoder's features, all normalised but for the classifier; of several positives, one.

    Returns:
        `pairs_alignment` and `pairs_uniformity` (Wang & Isola 2020), `pairs_distance_p05`, `_p50`, `_p95` of anchor and
        positive, `pairs_retrieval_top1`; where real images have labels also `pairs_agreement_top1`, how often a
        linear classifier fitted to them gives anchor and positive one class, and `pairs_agreement_chance`, how often
        if positives were shuffled.

    Raises:
        UsageError: there are no pairs.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    found = pair_features(frozen, "pairs", config.folder, config.count, run)
    anchors, positives = (F.normalize(features.to(run.device), dim=1) for features in found)
    distances = (anchors - positives).double().norm(dim=1)
    numbers = {
        "pairs_alignment": distances.square().mean().item(),
        "pairs_uniformity": (uniformity(anchors) + uniformity(positives)) / 2,
        "pairs_retrieval_top1": retrieval(anchors, positives),
    }
    numbers |= {f"pairs_distance_p{q:02d}": distances.quantile(q / 100).item() for q in _QUANTILES}
    return numbers | _agreement(found, frozen.split_features(data, "train"), run.config.seed)


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over all pairs of different rows of normalised features [N, D].

    0 where all are the same; about -4 + 8 / D in many dimensions D, where they point everywhere alike.
    """
    total = sum((4 * (part @ features.T).double() - 4).exp().sum() for part in features.split(_CHUNK))
    count = len(features)
    return ((total - count) / (count * (count - 1))).log().item()  # exp(0) of each with itself left out


def retrieval(anchors: Tensor, positives: Tensor) -> float:
    """Share of anchors whose own positive is the nearest of all positives; both normalised, [N, D]."""
    nearest = torch.cat([(part @ positives.T).argmax(1) for part in anchors.split(_CHUNK)])
    return (nearest == torch.arange(len(anchors), device=anchors.device)).double().mean().item()


def _agreement(pairs: PairFeatures, real: LabelledFeatures, seed: int) -> dict[str, float]:
    if len(real.labels.unique()) < 2:  # all are -1 where there are none
        return {}
    fitted = torch.randperm(len(real.labels), generator=seeds.generator(seed, "agreement"))[:_FITTED]
    scores = class_scores(real.features[fitted], real.labels[fitted], torch.cat(pairs))
    anchors, positives = scores.argmax(1).chunk(2)
    shares = [classes.bincount(minlength=scores.shape[1]).double() / len(classes) for classes in (anchors, positives)]
    return {
        "pairs_agreement_top1": (anchors == positives).double().mean().item(),
        "pairs_agreement_chance": (shares[0] @ shares[1]).item(),
    }
