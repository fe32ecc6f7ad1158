"""The reference's linear protocol: augmented crops through the frozen encoder, SGD on a linear classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast import augmentations
from copgen_fast.augmentations import random_views
from copgen_fast.errors import NonFiniteError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, count_classes, freeze, real_images
from copgen_fast.evals.linear import accuracies
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.stream import shuffled
from copgen_fast.images.views import Centre, RandomCrop, Several, View
from copgen_fast.ops import AugmentPolicy
from copgen_fast.options import Count, LearningRate, check_ranges
from copgen_fast.runtime import devices, seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.progress import progress

_NAME = "linear-augmented"


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
    """Train the classifier for `config.epochs` and score the test images after each.

    SGD with momentum 0.9, no weight decay, a learning rate of config.lr x batch / 256 on a cosine per epoch. Test
    images are resized to 8 / 7 of `--data.image-size`, of which they are the centre.

    Returns:
        `linear_augmented_top1_last`, after the last epoch, and `linear_augmented_top1_best`, after the epoch that
        did best on the test images themselves, as the reference code reports; where there are more than five classes,
        `linear_augmented_top5_last` and `linear_augmented_top5_best` of the same two epochs.

    Raises:
        UsageError: an unknown policy, or no epochs; images can't be decoded.
        NonFiniteError: a loss that is NaN or infinite.
        Interrupted: a stop was requested.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    test = frozen.split_features(data, "test", centre(data.config.image_size))
    with seeds.seeded(run.config.seed, _NAME):
        classifier = nn.Linear(test.features.shape[1], count_classes(data)).to(run.device)
    history, correct = [], {}
    with progress(config.epochs * data.splits["train"].count, _NAME, "images") as bar:
        for _ in train(frozen, data, config, classifier, run.config.seed, bar.update):
            with torch.no_grad():
                scores = torch.cat([classifier(part.to(run.device)).cpu() for part in test.features.split(8192)])
            history.append(accuracies("linear_augmented", scores, test.labels, correct))
    frozen.correct["linear_augmented_top1_last"] = correct["linear_augmented_top1"]
    best = max(history, key=lambda numbers: numbers["linear_augmented_top1"])
    return {f"{name}_{which}": row[name] for which, row in (("last", history[-1]), ("best", best)) for name in row}


def train(
    frozen: FrozenEncoder,
    data: OpenSet,
    config: Config,
    classifier: nn.Linear,
    seed: int,
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[int]:
    """Train a classifier of the features of augmented training images; yields the number of each epoch at its end.

    Args:
        done: told how many images were trained on since it was last called.

    Raises:
        NonFiniteError, UsageError, Interrupted: as `evaluate`.
    """
    optimizer = torch.optim.SGD(classifier.parameters(), lr=config.lr, momentum=0.9)
    # The encoder expects the normalisation that it was trained under.
    policy = dataclasses.replace(augmentations.get(config.augmentation), mean=frozen.mean, std=frozen.std)
    for epoch in range(1, config.epochs + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(config, frozen.batch, epoch)
        total = torch.zeros((), device=frozen.device)
        for features, labels, _ in augmented_features(frozen, data, policy, (seed, _NAME, epoch)):
            if stop_requested():
                raise Interrupted(f"stopped in epoch {epoch} of {_NAME}; run the same command to evaluate again")
            loss = F.cross_entropy(classifier(features), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            done(len(labels))
        if not total.isfinite():  # looked at once an epoch, so that the host doesn't wait for every step
            raise NonFiniteError(f"loss of {_NAME}: NaN or infinity in epoch {epoch}")
        yield epoch


def learning_rate(config: Config, batch: int, epoch: int) -> float:
    """Cosine set once per epoch, counted from 1, from lr = config.lr x batch / 256 down to lr x 0.2^3."""
    highest = config.lr * batch / 256
    lowest = highest * 0.2**3
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def centre(size: int) -> View:
    """What the reference takes of a test image: the centre, once the shorter side is resized to 8 / 7 of it."""
    return Centre(size, int(size / 0.875), "bilinear")


def augmented_features(
    frozen: FrozenEncoder,
    data: OpenSet,
    policy: AugmentPolicy,
    key: tuple[seeds.Key, ...],
    order: Iterable[Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features [B, D] and labels [B], on the device, of augmented training images, and indices [B] of these.

    Crops and flips are taken from the pixels of the files, in threads; colours are changed on the device.

    Args:
        key: seeds order and augmentation.
        order: indices of the images of each batch; None: every image once, shuffled.
    """
    for features, labels, indices in several_features(frozen, data, policy, [key], order):
        yield features[0], labels, indices


def several_features(
    frozen: FrozenEncoder,
    data: OpenSet,
    policy: AugmentPolicy,
    keys: Sequence[tuple[seeds.Key, ...] | None],
    order: Iterable[Tensor] | None = None,
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Features of several views of each training image, which is decoded once.

    Args:
        keys: of each view: seeds its augmentation; None takes the centre of the image, unchanged.
        order: as in `augmented_features`; None, which needs the first key, shuffles by that.

    Yields:
        Features [B, D] of each view and labels [B], on the device, and indices [B] of the images.
    """
    size, generators = data.config.image_size, [None if key is None else seeds.generator(*key) for key in keys]
    cropped = policy.crop_scale is not None
    taken = [
        centre(size)
        if key is None or not cropped
        else RandomCrop(size, key, policy.crop_scale, policy.crop_ratio, policy.flip)
        for key in keys
    ]
    rest = dataclasses.replace(policy, crop_scale=None, flip=0.0 if cropped else policy.flip)
    plain = rest == AugmentPolicy(mean=policy.mean, std=policy.std)
    order = shuffled(data.splits["train"].count, frozen.batch, generators[0]) if order is None else order
    for batch in data.stream("train", Several(tuple(taken)), order):
        if not len(batch.images):
            continue
        features = []
        for images, generator in zip(batch.images.split(3, 1), generators, strict=True):
            images = devices.send(images.contiguous(), frozen.device)
            unchanged = plain or generator is None
            views = frozen.normalize(images) if unchanged else random_views(images, rest, generator)
            features.append(frozen.encode(views))
        yield features, devices.send(batch.labels, frozen.device), batch.indices
