"""The reference's linear protocol: augmented crops through the frozen encoder, SGD on a linear classifier."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast import augmentations
from copgen_fast.augmentations import random_views
from copgen_fast.errors import NonFiniteError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, freeze
from copgen_fast.evals.linear import accuracies
from copgen_fast.images import sets
from copgen_fast.images.sets import LabelledImages
from copgen_fast.ops import AugmentPolicy
from copgen_fast.options import Count, LearningRate, check_ranges
from copgen_fast.runtime import seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested


@dataclass(frozen=True)
class Config:
    """Options of the linear probe on augmented crops."""

    epochs: Count = 60
    """Passes over the training images."""
    lr: LearningRate = 2.0
    """Learning rate per 256 images (the reference code: 2.0 for encoders trained on generated images, 0.3 for real
    ones)."""
    augmentation: str = "no-color"
    """Policy of the training crops."""

    def __post_init__(self) -> None:
        check_ranges(self)
        augmentations.get(self.augmentation)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Train the classifier for `config.epochs` and score the plain test images after each.

    SGD with momentum 0.9, no weight decay, a learning rate of config.lr x batch / 256 on a cosine per epoch.

    Returns:
        `linear_augmented_top1_last`, after the last epoch, and `linear_augmented_top1_best`, after the epoch that
        did best on the test images themselves, as the reference code reports; where there are more than five classes,
        `linear_augmented_top5_last` and `linear_augmented_top5_best` of the same two epochs.

    Raises:
        UsageError: an unknown policy, or no epochs.
        NonFiniteError: a loss that is NaN or infinite.
        Interrupted: a stop was requested.
    """
    frozen, data = freeze(encoder, run), sets.load(run.config.data)
    # The encoder expects the normalisation that it was trained under.
    policy = dataclasses.replace(augmentations.get(config.augmentation), mean=frozen.mean, std=frozen.std)
    test = frozen.features(data.test_images)
    with seeds.seeded(run.config.seed, "linear-augmented"):
        classifier = nn.Linear(test.shape[1], data.num_classes).to(run.device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=config.lr, momentum=0.9)
    history = []
    for epoch in range(1, config.epochs + 1):
        if stop_requested():
            raise Interrupted(
                f"stopped before epoch {epoch} of linear-augmented; run the same command to evaluate again"
            )
        optimizer.param_groups[0]["lr"] = learning_rate(config, frozen.batch, epoch)
        _train_epoch(frozen, classifier, optimizer, data, policy, (run.config.seed, "linear-augmented", epoch))
        with torch.no_grad():
            scores = torch.cat([classifier(part.to(run.device)).cpu() for part in test.split(frozen.batch)])
        history.append(accuracies("linear_augmented", scores, data.test_labels))
    best = max(history, key=lambda numbers: numbers["linear_augmented_top1"])
    return {f"{name}_{which}": row[name] for which, row in (("last", history[-1]), ("best", best)) for name in row}


def learning_rate(config: Config, batch: int, epoch: int) -> float:
    """Cosine set once per epoch, counted from 1, from lr = config.lr x batch / 256 down to lr x 0.2^3."""
    highest = config.lr * batch / 256
    lowest = highest * 0.2**3
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def _train_epoch(
    frozen: FrozenEncoder,
    classifier: nn.Linear,
    optimizer: torch.optim.SGD,
    data: LabelledImages,
    policy: AugmentPolicy,
    key: tuple[seeds.Key, ...],
) -> None:
    generator = seeds.generator(*key)
    total = torch.zeros((), device=frozen.device)
    for chosen in torch.randperm(len(data.train_images), generator=generator).split(frozen.batch):
        images = data.train_images[chosen].to(frozen.device)
        with torch.no_grad():
            features = frozen.encoder(random_views(images, policy, generator)).float()
        loss = F.cross_entropy(classifier(features), data.train_labels[chosen].to(frozen.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # looked at once an epoch, so that the host doesn't wait for every step
        raise NonFiniteError(f"loss of linear-augmented: NaN or infinity in epoch {key[-1]}")
