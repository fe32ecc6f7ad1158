"""k-nearest-neighbour classification by cosine similarity: no training, so it shows the features' geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.images.sets import SPLITS
from copgen_fast.options import Count, check_ranges

_CHUNK = 1024
_WEIGHTED = [(k, temperature) for k in (20, 200) for temperature in (0.07, 0.1)]
"""k and temperature of the weighted votes that others report: DINO's (20, .07), and (200, .1) of Wu et al. 2018."""


@dataclass(frozen=True)
class Config:
    """Options of the nearest-neighbour vote."""

    neighbours: Count = 20
    """k, the nearest training images that vote."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check(config: Config, train_labels: Tensor) -> None:
    """Raises UsageError where there are fewer training images than neighbours."""
    if config.neighbours > len(train_labels):
        raise UsageError(
            f"--evals.options knn.neighbours: expected 1 .. {len(train_labels)} training images, "
            f"got {config.neighbours}"
        )


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Each test image takes the class of most of its `config.neighbours` nearest training images.

    One vote a neighbour; between classes of equal votes, the larger sum of similarities decides. Beside it the vote
    weighted by exp(similarity / T), of the k nearest.

    Returns:
        `knn_top1`, and `knn_kK_tT_top1` of the weighted vote for k 20 and 200, T 0.07 and 0.10, where there are as many
        training images.

    Raises:
        UsageError: `config.neighbours` is not in 1 .. the number of training images.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    train, test = (frozen.split_features(data, split) for split in SPLITS)
    check(config, train.labels)
    bank, labels, queries = (tensor.to(run.device) for tensor in (*train, test.features))
    predicted = {"knn_top1": classify(bank, labels, queries, config.neighbours)}
    for k, temperature in _WEIGHTED:
        if k <= len(bank):
            name = f"knn_k{k}_t{round(100 * temperature):02d}_top1"
            predicted[name] = classify(bank, labels, queries, k, temperature)
    correct = {name: found.cpu() == test.labels for name, found in predicted.items()}
    frozen.correct.update(correct)
    return {name: hits.double().mean().item() for name, hits in correct.items()}


def classify(train: Tensor, labels: Tensor, test: Tensor, neighbours: int, temperature: float | None = None) -> Tensor:
    """Classes, int64 [M], of features `test` [M, D] by features `train` [N, D] with `labels` int64 [N].

    Args:
        temperature: T of votes of weight exp(similarity / T); None: a vote a neighbour.
    """
    bank = F.normalize(train, dim=1).T
    predicted = []
    for chunk in F.normalize(test, dim=1).split(_CHUNK):
        similarity, index = (chunk @ bank).topk(neighbours, dim=1)
        similarity = similarity.double()
        if temperature is None:
            # A sum of k similarities is within [-k, k]: scaled to less than half a vote either way, it only breaks
            # ties.
            weights = 1 + similarity / (2 * neighbours + 1)
        else:
            weights = (similarity / temperature).exp()
        votes = weights.new_zeros(len(chunk), int(labels.max()) + 1)
        predicted.append(votes.scatter_add(1, labels[index], weights).argmax(dim=1))
    return torch.cat(predicted)
