"""Low-shot probe: the linear probe with a few labels per class, over several fixed draws of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.evals.linear import accuracies, class_scores
from copgen_fast.images.sets import SPLITS
from copgen_fast.options import Count, check_ranges
from copgen_fast.runtime import seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested


@dataclass(frozen=True)
class Config:
    """Options of the low-shot probe."""

    shots: Count = 10
    """Labels per class."""
    draws: Count = 5
    """Fixed draws of those labels; their mean and spread are reported."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check(config: Config, train_labels: Tensor) -> None:
    """Raises UsageError where a class has fewer training images than shots."""
    _expect_shots(train_labels.bincount(), config.shots)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Fit on `config.shots` training images per class, score all test images; `config.draws` times.

    The draws depend on the seed and the labels alone, so every encoder is evaluated on the same ones.

    Returns:
        `lowshot_top1`, the mean over draws; `lowshot_std`, their sample standard deviation (0 for one draw);
        `lowshot_min`, `lowshot_max`.

    Raises:
        UsageError: a class with fewer images than shots.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    train, test = (frozen.split_features(data, split) for split in SPLITS)
    found = []
    for draw in range(config.draws):
        if stop_requested():
            raise Interrupted("stopped in the low-shot probe; run the same command to evaluate again")
        chosen = draw_labels(train.labels, config.shots, run.config.seed, draw)
        scores = class_scores(train.features[chosen], train.labels[chosen], test.features)
        found.append(accuracies("lowshot", scores, test.labels)["lowshot_top1"])
    top1 = torch.tensor(found, dtype=torch.float64)
    return {
        "lowshot_top1": top1.mean().item(),
        "lowshot_std": top1.std().item() if config.draws > 1 else 0.0,
        "lowshot_min": top1.min().item(),
        "lowshot_max": top1.max().item(),
    }


def draw_labels(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Indices of `shots` different images of every class, int64 [C * shots].

    Args:
        labels: int64 [N].

    Raises:
        UsageError: a class has fewer images than that, or `shots` is not positive.
    """
    counts = labels.bincount()
    _expect_shots(counts, shots)
    generator = seeds.generator(seed, "lowshot", draw)
    chosen = []
    for label in range(len(counts)):
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


def _expect_shots(counts: Tensor, shots: int) -> None:
    if not 1 <= shots <= counts.min():
        raise UsageError(
            f"--evals.options lowshot.shots: expected 1 .. {counts.min()}, the training images of class "
            f"{counts.argmin()}, got {shots}"
        )
