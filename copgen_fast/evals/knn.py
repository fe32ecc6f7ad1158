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

    One vote a neighbour; between classes of equal votes, the larger sum of similarities decides.

    Returns:
        `knn_top1`.

    Raises:
        UsageError: `config.neighbours` is not in 1 .. the number of training images.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    train, test = (frozen.split_features(data, split) for split in SPLITS)
    check(config, train.labels)
    bank, labels = (tensor.to(run.device) for tensor in train)
    predicted = classify(bank, labels, test.features.to(run.device), config.neighbours).cpu()
    return {"knn_top1": (predicted == test.labels).double().mean().item()}


def classify(train: Tensor, labels: Tensor, test: Tensor, neighbours: int) -> Tensor:
    """Classes, int64 [M], of features `test` [M, D] by features `train` [N, D] with `labels` int64 [N]."""
    bank = F.normalize(train, dim=1).T
    predicted = []
    for chunk in F.normalize(test, dim=1).split(_CHUNK):
        similarity, index = (chunk @ bank).topk(neighbours, dim=1)
        # A sum of k similarities is within [-k, k]: scaled to less than half a vote either way, it only breaks ties.
        weights = 1 + similarity.double() / (2 * neighbours + 1)
        votes = weights.new_zeros(len(chunk), int(labels.max()) + 1)
        predicted.append(votes.scatter_add(1, labels[index], weights).argmax(dim=1))
    return torch.cat(predicted)
