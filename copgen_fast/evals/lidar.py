"""LiDAR (Thilak et al. 2024): over how many directions images differ more than views of one image. Needs no labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from copgen_fast import augmentations
from copgen_fast.augmentations import random_views
from copgen_fast.errors import NonFiniteError
from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.evals.collapse import effective_number
from copgen_fast.images.views import Centre
from copgen_fast.options import Range, check_ranges
from copgen_fast.runtime import seeds

NEEDS_LABELS = False


@dataclass(frozen=True)
class Config:
    """Options of LiDAR."""

    images: Annotated[int, Range(2)] = 1000
    """Training images, drawn at random; all where there are fewer."""
    views: Annotated[int, Range(2)] = 50
    """Random views of each."""
    delta: Annotated[float, Range(1e-12, 1e3)] = 1e-4
    """Added to the variance within images, in every direction."""
    augmentation: str | None = None
    """Policy of the views; None: that of pretraining."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.augmentation is not None:
            augmentations.get(self.augmentation)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Measure the encoder's features (before any projection head) of random views of training images.

    Returns:
        `lidar`, 1 .. D.

    Raises:
        NonFiniteError: a NaN or an infinity in the features.
        Interrupted: a stop was requested.
    """
    return {"lidar": lidar(_views(encoder, config, run), config.delta)}


def _views(encoder: nn.Module, config: Config, run: EvalRun) -> Iterator[Tensor]:
    """Features [B, views, D] of some images after the others."""
    frozen, data, seed = freeze(encoder, run), real_images(run), run.config.seed
    policy = augmentations.get(config.augmentation or run.config.pretrain.augmentation)
    policy = dataclasses.replace(policy, mean=frozen.mean, std=frozen.std)
    generator = seeds.generator(seed, "lidar")
    order = torch.randperm(data.splits["train"].count, generator=generator)[: config.images]
    batches = order.split(max(1, frozen.batch // config.views))
    for batch in data.stream("train", Centre(run.config.data.image_size), batches):
        if not len(batch.images):  # none of them can be decoded
            continue
        images = batch.images.to(run.device).repeat_interleave(config.views, 0)
        features = frozen.encode(random_views(images, policy, generator)).double()
        if not features.isfinite().all():
            raise NonFiniteError("features of lidar: NaN or infinity")
        yield features.unflatten(0, (-1, config.views))


def lidar(parts: Iterable[Tensor], delta: float) -> float:
    """exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2, as shares of their sum.

    Args:
        parts: features [n, q, D] of n images by q views, in parts along n, in float64.

    B is the covariance of the n means of an image's views, W that of views around their mean, plus delta I.
    """
    means, within, count = [], 0.0, 0
    for part in parts:
        means.append(part.mean(1))
        deviations = (part - means[-1][:, None]).flatten(0, 1)
        within, count = within + deviations.T @ deviations, count + len(deviations) - len(part)
    centred = torch.cat(means)
    centred = (centred - centred.mean(0)) / math.sqrt(len(centred) - 1)
    within = within / count + delta * torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    # W = L L^T: L^-1 B L^-T has the same eigenvalues.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), centred.T, upper=False)
    return effective_number(torch.linalg.svdvals(whitened).square())
