"""Low-shot probe: the linear probe with a few labels per class, over several fixed draws of them."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.config import ProbeConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals._features import Subject
from copgen_fast.evals.linear import accuracies, class_scores
from copgen_fast.images.sets import LabelledImages
from copgen_fast.runtime import seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested


def evaluate(subject: Subject, data: LabelledImages, config: ProbeConfig, seed: int) -> dict[str, float]:
    """Fit on `config.shots` training images per class, score all test images; `config.draws` times.

    The draws depend on the seed and the labels alone, so every subject is judged on the same ones.

    Returns:
        `lowshot_top1`, the mean over draws; `lowshot_std`, their sample standard deviation (0 for one draw);
        `lowshot_min`, `lowshot_max`.

    Raises:
        UsageError: no draws, or a class with fewer images than shots.
    """
    if config.draws < 1:
        raise UsageError(f"--probe.draws: expected at least 1, got {config.draws}")
    train = subject.features(data.train_images, config.batch)
    test = subject.features(data.test_images, config.batch)
    found = []
    for draw in range(config.draws):
        if stop_requested():
            raise Interrupted("stopped in the low-shot probe; run the same command to judge again")
        chosen = draw_labels(data.train_labels, config.shots, seed, draw)
        scores = class_scores(train[chosen], data.train_labels[chosen], test)
        found.append(accuracies("lowshot", scores, data.test_labels)["lowshot_top1"])
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
    if not 1 <= shots <= counts.min():
        raise UsageError(
            f"--probe.shots: expected 1 .. {counts.min()}, the training images of class {counts.argmin()}, got {shots}"
        )
    generator = seeds.generator(seed, "lowshot", draw)
    chosen = []
    for label in range(len(counts)):
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)
