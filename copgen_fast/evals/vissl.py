"""VISSL's linear transfer: augmented crops, frozen features, batch norm in training mode before a linear classifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.config import Side
from copgen_fast.errors import NonFiniteError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, count_classes, freeze, real_images
from copgen_fast.evals._vissl import epoch_order, stepped, test_view, train_view
from copgen_fast.evals.linear import accuracies, both_accuracies
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.transfer_sets import rules
from copgen_fast.images.views import RandomCrop, Squash
from copgen_fast.options import Count, LearningRate, Range, check_ranges
from copgen_fast.runtime import devices, seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.progress import progress

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """Options of VISSL's linear protocol; the defaults are its configuration files'."""

    size: Side = 224
    """Pixels a side of the crops."""
    epochs: Count = 28
    """Passes over the training images."""
    milestones: tuple[Count, ...] = (8, 16, 24)
    """Epochs after which the learning rate is a tenth."""
    lr: LearningRate = 0.01
    """Learning rate per 256 images."""
    weight_decay: Annotated[float, Range(0, 1e3)] = 5e-4
    """Of the linear layer, its bias included; batch norm has none."""
    batch: Annotated[int, Range(2)] = 256
    """Images a step; an epoch's last ones make a smaller step."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Train batch norm and a linear layer on frozen features of augmented images; score the last epoch's.

    SGD with Nesterov momentum 0.9. Nothing is chosen, so validation parts are trained on, but for SUN397's, whose 10 %
    VISSL leaves unused. CIFAR's and SUN397's images are not cropped (`transfer_sets.rules`).

    Returns:
        `vissl_top1`, `vissl_top5` where there are more than five classes, `vissl_top1_per_class`, the mean over
        classes of each one's.

    Raises:
        NonFiniteError: a loss that is NaN or infinite.
        Interrupted: a stop was requested.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    test, expected = frozen.split_features(data, "test", test_view(config.size, rules(data.config.name).crop))
    head = fit(frozen, data, config, run, test.shape[1]).eval()
    with torch.no_grad():
        scores = torch.cat([head(part.to(run.device)).cpu() for part in test.split(config.batch)])
    per_class = both_accuracies(scores.argmax(1), expected)[1]
    return accuracies("vissl", scores, expected, frozen.correct) | {"vissl_top1_per_class": per_class}


def fit(frozen: FrozenEncoder, data: OpenSet, config: Config, run: EvalRun, dim: int) -> nn.Module:
    """The trained classifier of features [N, dim]."""
    settings, rows = rules(data.config.name), torch.arange(data.splits["train"].count)
    if data.validation is not None and not settings.merged:
        rows = rows[~torch.isin(rows, data.validation)]
    with seeds.seeded(run.config.seed, "vissl"):
        norm, linear = nn.BatchNorm1d(dim), nn.Linear(dim, count_classes(data))
    head = nn.Sequential(norm, linear).to(run.device).train()
    groups = [{"params": linear.parameters(), "weight_decay": config.weight_decay}, {"params": norm.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    batches = _cropped if settings.crop else _whole
    with progress(config.epochs * len(rows), f"vissl {data.config.name}", "images") as bar:
        for epoch in range(config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = stepped(config.lr, config.batch, config.milestones, epoch)
            total = torch.zeros((), device=run.device)
            for features, expected in batches(frozen, data, config, run, rows, epoch):
                if stop_requested():
                    raise Interrupted(f"stopped in epoch {epoch + 1} of vissl; run the same command to evaluate again")
                if len(features) > 1:  # batch norm has no statistics of one image: it waits for the next epoch
                    loss = F.cross_entropy(head(features), expected)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    total += loss.detach() * len(features)
                bar.update(len(features), epoch=f"{epoch + 1}/{config.epochs}")
            if not total.isfinite():  # looked at once an epoch, so that the host doesn't wait for every step
                raise NonFiniteError(f"loss of vissl: NaN or infinity in epoch {epoch + 1}")
            bar.update(0, loss=total.item() / len(rows))
    return head


def _cropped(
    frozen: FrozenEncoder, data: OpenSet, config: Config, run: EvalRun, rows: Tensor, epoch: int
) -> Iterator[Batch]:
    """Features and labels of an epoch's random crops, encoded as they are decoded."""
    key = (run.config.seed, "vissl", epoch)
    for batch in data.stream(
        "train", train_view(config.size, True, *key), epoch_order(rows, config.batch, False, *key)
    ):
        if len(batch.images):
            yield frozen.encode(frozen.normalize(batch.images)), devices.send(batch.labels, run.device)


def _whole(
    frozen: FrozenEncoder, data: OpenSet, config: Config, run: EvalRun, rows: Tensor, epoch: int
) -> Iterator[Batch]:
    """The same of whole images, mirrored by chance: there are two of each, which are encoded once for all epochs."""
    plain, labels = frozen.split_features(data, "train", Squash(config.size))
    flipped, _ = frozen.split_features(data, "train", RandomCrop(config.size, (), flip=1.0, crop=False))
    places = torch.isin(data.readable("train"), rows).nonzero().squeeze(1)
    key = (run.config.seed, "vissl", epoch)
    flips = torch.rand(len(labels), generator=seeds.generator(*key, "flip")) < 0.5
    for chosen in epoch_order(places, config.batch, False, *key):
        features = torch.where(flips[chosen, None], flipped[chosen], plain[chosen])
        yield features.to(run.device), labels[chosen].to(run.device)
