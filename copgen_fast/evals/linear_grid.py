"""Linear probes for a grid of learning rates and weight decays, trained together on cached features of a few views."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from copgen_fast import augmentations
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, freeze, real_images
from copgen_fast.evals.lbfgs import validation_rows
from copgen_fast.evals.linear import accuracies
from copgen_fast.evals.linear_augmented import centre, several_features
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.stream import in_order, shuffled
from copgen_fast.options import Count, LearningRate, Range, check_ranges
from copgen_fast.runtime import seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.memory import available_memory
from copgen_fast.runtime.progress import progress

_NAME = "linear-grid"
_CONSTANT = 1e-3  # a feature's standard deviation, in its mean, below which half precision holds mostly rounding
_MOVED = 65536  # features moved at once
_SHARE = 0.6  # of a GPU's free memory that features may take


@dataclass(frozen=True)
class Config:
    """Options of the grid of linear probes."""

    passes: Count = 4
    """Views encoded for each training image: its centre, the others augmented. All heads and epochs share them."""
    epochs: Count = 30
    """Passes over the training images by the heads; each image comes with its views in turn."""
    lrs: tuple[LearningRate, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates per 256 images, on standardised features."""
    weight_decays: tuple[Annotated[float, Range(0, 10)], ...] = (0.0, 1e-5, 1e-4, 1e-3)
    """Weight decays; every one is tried with every learning rate."""
    held_out: Annotated[float, Range(0.01, 0.9)] = 0.1
    """Share of each class's training images that chooses the head."""
    batch: Count = 512
    """Images a step of the heads."""
    augmentation: str = "no-color"
    """Policy of the training crops."""

    def __post_init__(self) -> None:
        check_ranges(self)
        augmentations.get(self.augmentation)
        if not (self.lrs and self.weight_decays):
            raise ValueError("lrs, weight_decays: expected at least one of each")


class Cache(NamedTuple):
    """Cached features, float16 [K, N, D], of K views of N training images (the first is the centre); labels [N]."""

    features: Tensor
    labels: Tensor


class Heads(NamedTuple):
    """G linear classifiers, weight [D, G, C] and bias [G, C], of features (x - mean) * inverse."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    inverse: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Logits [N, G, C] of features [N, D]."""
        return self.of_standardised(self.standardised(features))

    def standardised(self, features: Tensor) -> Tensor:
        """Features [N, D] of mean 0 and standard deviation 1, float32 on the heads' device."""
        return (features.to(self.weight.device).float() - self.mean) * self.inverse

    def of_standardised(self, x: Tensor) -> Tensor:
        """Logits [N, G, C] of standardised features [N, D]."""
        return torch.addmm(self.bias.flatten(), x, self.weight.flatten(1)).unflatten(1, self.bias.shape)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Linear evaluation over a grid: encode each training image's views once, train all heads on them, choose the best.

    A head is chosen by its accuracy on the centres of a held-out part of the training images, trained once more on
    all of them, and scored on the test images, which nothing else looks at.

    Returns:
        `linear_grid_top1`, and `linear_grid_top5` where there are more than five classes; `linear_grid_held_out_top1`,
        what the head was chosen by, and its `grid_lr` and `grid_weight_decay`.

    Raises:
        UsageError: the features don't fit into memory.
        NonFiniteError: features beyond half precision, or a loss of every head that is NaN or infinite.
        Interrupted: a stop was requested.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    cache = encode(frozen, data, config, run.config.seed)
    held_out = validation_rows(data, cache.labels, config.held_out, run.config.seed, f"{_NAME} chooses a head")
    fitted = torch.ones(len(cache.labels), dtype=torch.bool)
    fitted[held_out] = False
    grid = [(lr, decay) for lr in config.lrs for decay in config.weight_decays]
    heads = train(cache, fitted.nonzero().squeeze(1), grid, config, run)
    found = _accuracies_of_heads(heads, cache, held_out.split(config.batch))  # as many logits at once as in training
    if found.max() < 0:
        raise NonFiniteError(f"{_NAME}: the logits of every head are NaN or infinite: see {_NAME}.lrs")
    best = int(found.argmax())
    final = train(cache, torch.arange(len(cache.labels)), [grid[best]], config, run)
    test = frozen.split_features(data, "test", centre(data.config.image_size))
    scores = torch.cat([final.scores(part)[:, 0].cpu() for part in test.features.split(4096)])
    return accuracies("linear_grid", scores, test.labels, frozen.correct) | {
        "linear_grid_held_out_top1": found[best].item(),
        "grid_lr": grid[best][0],
        "grid_weight_decay": grid[best][1],
    }


def encode(frozen: FrozenEncoder, data: OpenSet, config: Config, seed: int) -> Cache:
    """Encode `config.passes` views of every training image that can be decoded: its centre, the others augmented.

    Raises:
        UsageError: they don't fit into memory, which is known before the first pass; or no image can be decoded.
        NonFiniteError: a feature that half precision does not hold.
    """
    policy = dataclasses.replace(augmentations.get(config.augmentation), mean=frozen.mean, std=frozen.std)
    size, count = data.config.image_size, data.splits["train"].count
    dim = frozen.features(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape[1]
    shape = (config.passes, count, dim)
    features = torch.empty(shape, dtype=torch.float16, device=_place(shape, frozen.device))
    labels = torch.full((count,), -1)
    with progress(config.passes * count, _NAME, "images") as bar:
        keys = [None, *((seed, _NAME, number) for number in range(1, config.passes))]
        for views, y, indices in several_features(frozen, data, policy, keys, in_order(count, frozen.batch)):
            for of_pass, x in zip(features, views, strict=True):
                of_pass[indices.to(features.device)] = x.to(features.device).half()
            labels[indices] = y.cpu()
            bar.update(len(views) * len(y))
    indices = (labels >= 0).nonzero().squeeze(1)
    if not len(indices):
        raise UsageError(f"{data.where}: no train image can be decoded")
    if len(indices) < count:
        for of_pass in features:  # moved up in place, as a copy of all need not fit
            for start, part in zip(range(0, count, _MOVED), indices.split(_MOVED), strict=False):
                of_pass[start : start + len(part)] = of_pass[part.to(features.device)]
        features, labels = features[:, : len(indices)], labels[indices]
    if not all(part.isfinite().all() for view in features for part in view.split(65536)):
        raise NonFiniteError(f"{_NAME}: features that are NaN, infinite or beyond half precision (65504)")
    return Cache(features, labels)


def _place(shape: tuple[int, int, int], device: torch.device) -> torch.device:
    """Where the features are kept: on the device, where they leave room there, else in the host's memory; said."""
    passes, count, dim = shape
    needed = 2 * passes * count * dim / 1e6
    on_device = available_memory(device) if device.type == "cuda" else None
    place = device if on_device is not None and needed < _SHARE * on_device else torch.device("cpu")
    free = available_memory(place)
    there = "" if free is None else f" of {free / 1e3:.3g} GB free"
    size = f"{needed / 1e3:.3g} GB{there} on {place}"
    what = f"{passes} x {count:,} features of {dim:,} numbers in half precision, {size}"
    if free is not None and needed > free:
        fits = int(free / (needed / passes))
        remedy = f"{_NAME}.passes={fits} would fit" if fits else "take linear-augmented, which keeps none"
        raise UsageError(f"{_NAME} keeps {what}: {remedy}")
    print(f"{_NAME}: {what}", flush=True)
    return place


def train(cache: Cache, rows: Tensor, grid: list[tuple[float, float]], config: Config, run: EvalRun) -> Heads:
    """Train a head for each learning rate and weight decay on some rows of the cache, all in the same products.

    SGD with momentum 0.9 from zero weights, on a cosine per step; heads differ in these two numbers alone.

    Raises:
        Interrupted: a stop was requested.
    """
    device, views = run.device, len(cache.features)
    mean, inverse = standardisation(cache.features[0], device)
    classes, dim = int(cache.labels.max()) + 1, cache.features.shape[2]
    weight = torch.zeros(dim, len(grid), classes, device=device)
    bias = torch.zeros(len(grid), classes, device=device)
    heads, parameters = Heads(weight, bias, mean, inverse), (weight, bias)
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    lrs, decays = (torch.tensor(column, device=device)[:, None] for column in zip(*grid, strict=True))
    steps, step = config.epochs * math.ceil(len(rows) / config.batch), 0
    with progress(config.epochs * len(rows), f"{_NAME}, {len(grid)} heads", "images") as bar:
        for epoch in range(config.epochs):
            generator = seeds.generator(run.config.seed, _NAME, "heads", epoch)
            for chosen in shuffled(len(rows), config.batch, generator):
                if stop_requested():
                    raise Interrupted(f"stopped in {_NAME}; run the same command to evaluate again")
                at = rows[chosen]
                x = cache.features[((at + epoch) % views).to(cache.features.device), at.to(cache.features.device)]
                rate = lrs * config.batch / 256 * (1 + math.cos(math.pi * step / steps)) / 2
                gradients = _gradients(heads, x, cache.labels[at].to(device))
                for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                    velocity.mul_(0.9).add_(gradient).addcmul_(decays, parameter)
                    parameter.addcmul_(rate, velocity, value=-1)
                step += 1
                bar.update(len(at))
    return heads


def _gradients(heads: Heads, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each head's mean cross entropy with respect to its weight and bias."""
    x = heads.standardised(features)
    residuals = heads.of_standardised(x).softmax(2)
    residuals[torch.arange(len(labels), device=x.device), :, labels] -= 1
    residuals /= len(labels)
    return (x.T @ residuals.flatten(1)).unflatten(1, heads.bias.shape), residuals.sum(0)


def standardisation(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean of features [N, D], and 1 / their standard deviation, or 0 where that is lost in half precision."""
    total, squares = (torch.zeros(features.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    for part in features.split(8192):
        part = part.to(device).double()
        total += part.sum(0)
        squares += part.square().sum(0)
    mean = total / len(features)
    std = (squares / len(features) - mean.square()).clamp_min(0).sqrt()
    varies = std > _CONSTANT * mean.abs()
    return mean.float(), torch.where(varies, 1 / std, 0.0).float()


def _accuracies_of_heads(heads: Heads, cache: Cache, batches: Sequence[Tensor]) -> Tensor:
    """Each head's accuracy on the centres of some training images; -1 where its logits are not finite."""
    right, finite = torch.zeros(heads.bias.shape[0]), torch.ones(heads.bias.shape[0], dtype=torch.bool)
    for part in batches:
        scores = heads.scores(cache.features[0, part.to(cache.features.device)]).cpu()
        right += (scores.argmax(2) == cache.labels[part, None]).sum(0)
        finite &= scores.isfinite().all(2).all(0)
    return torch.where(finite, right / sum(map(len, batches)), -1.0)
