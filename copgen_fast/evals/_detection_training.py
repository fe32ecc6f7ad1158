"""Training of a detector: which images a step takes, how they are shown, the learning rate, and batch norm's end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from copgen_fast.config import RunConfig
from copgen_fast.evals._faster_rcnn import FasterRCNN, Target
from copgen_fast.evals._voc_ap import Found
from copgen_fast.images.views import resize_pixels
from copgen_fast.images.voc import AnnotatedImage
from copgen_fast.pairs.read.prefetch import Prefetcher
from copgen_fast.runtime import devices, seeds
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.progress import progress
from copgen_fast.training import loop, optimizers, sync_bn
from copgen_fast.training.grad_sync import data_parallel
from copgen_fast.training.loop import StepResult

_AHEAD = 3  # batches that are made while one is used
_WARMUP_FROM = 1e-3
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    Attributes:
        milestones: steps from which the learning rate is a tenth of what it was.
        warmup: steps in which it rises from a thousandth, linearly.
        sizes: what the shorter side of a training image is resized to, one of them at random.
        test_size: in tests.
        max_size: of the longer side, which may make the shorter one smaller.
        precise_bn: batches that estimate batch norm's statistics anew in the end.
    """

    iterations: int
    batch: int
    lr: float
    milestones: tuple[int, ...]
    warmup: int
    sizes: tuple[int, ...]
    test_size: int
    max_size: int
    precise_bn: int

    def learning_rate(self, step: int) -> float:
        """That of a step."""
        done = min(1.0, step / self.warmup) if self.warmup else 1.0
        return self.lr * (_WARMUP_FROM * (1 - done) + done) * 0.1 ** sum(step >= at for at in self.milestones)


@dataclass(frozen=True)
class Batch:
    """Inputs of one step: `images`, `targets`, `keys` and `sides` of `FasterRCNN.forward`, and the learning rate."""

    images: list[Tensor]
    targets: list[Target]
    keys: list[tuple[seeds.Key, ...]]
    sides: tuple[int, int]
    lr: float


def grouped_order(landscape: Sequence[bool], batch: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the images of each step, all of one orientation, so that little padding is needed.

    Images come in permutations, one after the other, and wait until a batch of their orientation is full.
    """
    order: list[list[int]] = []
    waiting: dict[bool, list[int]] = {True: [], False: []}
    epoch = 0
    while True:
        drawn = torch.randperm(len(landscape), generator=seeds.generator(seed, "detection order", epoch))
        for index in drawn.tolist():
            group = waiting[landscape[index]]
            group.append(index)
            if len(group) == batch:
                order.append(group.copy())
                group.clear()
            if len(order) == steps:
                return order
        epoch += 1


def resized(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side is resized to `shorter`, its longer one to `longest` at most."""
    # In detectron2's order of operations: in another one, halves would be rounded to the other side now and then.
    scale = shorter / min(height, width)
    rows, columns = (shorter, scale * width) if height < width else (scale * height, shorter)
    if max(rows, columns) > longest:
        scale = longest / max(rows, columns)
        rows, columns = rows * scale, columns * scale
    return int(rows + 0.5), int(columns + 0.5)


def shown(image: AnnotatedImage, size: tuple[int, int], flip: bool) -> tuple[Tensor, Target]:
    """A training image resized to `size`, uint8 [3, H, W], mirrored or not, and its boxes, cut at its edges."""
    pixels = resize_pixels(image.pixels(), size)
    boxes = scaled(image.boxes, (image.height, image.width), size)
    if flip:
        pixels = pixels.flip(2)
        boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], 1)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([*size[::-1], *size[::-1]]))
    return pixels, {"boxes": boxes, "labels": image.labels + 1}


def scaled(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Boxes of an image that was (height, width) `before` and is `after`."""
    height, width = (new / old for new, old in zip(after, before, strict=True))
    return boxes * torch.tensor([width, height, width, height])


class Batches:
    """The batches of a training by step, decoded ahead; what is drawn depends on the seed and the step alone."""

    def __init__(
        self, images: Sequence[AnnotatedImage], recipe: Recipe, seed: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.images, self.recipe, self.seed, self.device, self.ranks = images, recipe, seed, device, ranks
        landscape = [image.width > image.height for image in images]
        self.order = grouped_order(landscape, recipe.batch, recipe.iterations + recipe.precise_bn, seed)
        self._pool = ThreadPoolExecutor()
        self._prefetch = Prefetcher(lambda step: partial(self.make, step), _AHEAD, len(self.order))

    def __call__(self, step: int) -> Batch:
        batch = self._prefetch(step)
        images = [devices.send(image, self.device) for image in batch.images]
        targets = [{k: devices.send(v, self.device) for k, v in target.items()} for target in batch.targets]
        return Batch(images, targets, batch.keys, batch.sides, batch.lr)

    def make(self, step: int) -> Batch:
        """The batch of a step, of this rank's rows."""
        generator = seeds.generator(self.seed, "detection", step)
        count, recipe = self.recipe.batch, self.recipe
        shorter = torch.tensor(recipe.sizes)[torch.randint(len(recipe.sizes), (count,), generator=generator)].tolist()
        flips = (torch.rand(count, generator=generator) < 0.5).tolist()
        images = [self.images[index] for index in self.order[step]]
        sizes = [
            resized(image.height, image.width, side, recipe.max_size)
            for image, side in zip(images, shorter, strict=True)
        ]
        rows = range(count)[self.ranks.rows(count)]
        made = list(self._pool.map(lambda row: shown(images[row], sizes[row], flips[row]), rows))
        keys = [(self.seed, "detection", step, row) for row in rows]
        sides = tuple(map(max, zip(*sizes, strict=True)))  # of all ranks' rows
        return Batch([image for image, _ in made], [x for _, x in made], keys, sides, recipe.learning_rate(step))


def param_groups(model: nn.Module) -> list[dict]:
    """Parameters with weight decay, and those of norms without."""
    norms = {id(p) for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters(False)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in norms]
    others = [parameter for parameter in model.parameters() if id(parameter) in norms]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def train(
    detector: FasterRCNN,
    images: Sequence[AnnotatedImage],
    recipe: Recipe,
    config: RunConfig,
    folder: Path,
    ranks: Ranks,
) -> FasterRCNN:
    """Train the detector, from its checkpoint in `folder` on where there is one; returns it in eval mode.

    Raises:
        UsageError: an image can't be decoded.
        NonFiniteError, Interrupted, LostRankError: as `training.loop.run`.
    """
    device = detector.mean.device
    detector = sync_bn.convert_sync_bn(detector, config.bn, ranks, device)
    called = data_parallel(detector.train(), ranks)
    precision = config.probe.precision
    sgd = optimizers.sgd(param_groups(detector), recipe.lr, _MOMENTUM, _WEIGHT_DECAY, config.optimizer.impl, device)
    scaler = devices.grad_scaler(device, precision)
    batches = Batches(images, recipe, config.seed, device, ranks)

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        with devices.autocast(device, precision):
            return called(batch.images, batch.targets, batch.keys, batch.sides)

    def step(index: int, batch: Batch) -> StepResult:
        for group in sgd.param_groups:
            group["lr"] = batch.lr
        losses = losses_of(batch)
        loss = sum(losses.values())
        optimizers.descend(loss, scaler, sgd)
        return StepResult({"loss": loss, **losses}, {"loss": loss})

    plan = loop.Plan("detection", folder, recipe.iterations, recipe.batch, config.log_every, config.save_every)
    state = {"detector": detector, "optimizer": sgd, "scaler": scaler}
    loop.run(step, batches, state, plan, ranks=ranks)
    with _population_statistics(detector, ranks), torch.no_grad():
        for index in range(recipe.precise_bn):
            _expect_no_stop()
            losses_of(batches(recipe.iterations + index))
    return detector.eval()


@contextlib.contextmanager
def _population_statistics(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """PreciseBN: batch norm's running mean and variance become those of all its inputs within the `with` block.

    Inputs of all forwards, on all ranks, count as one batch (as fvcore computes it; Wu and Johnson 2021,
    "Rethinking 'Batch' in BatchNorm", appendix). The mean of the batches' variances would leave out how far the means
    of batches differ. A norm that sees nothing keeps its statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    # Of each norm: how many values a channel had, their sum and that of their squares.
    sums = {
        norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device) for norm in norms
    }
    before = {norm: {name: value.clone() for name, value in norm.named_buffers()} for norm in norms}

    def add(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        variance, mean = torch.var_mean(
            x.to(torch.promote_types(x.dtype, torch.float32)), (0, *range(2, x.dim())), correction=0
        )
        variance, mean, count = variance.double(), mean.double(), x.numel() // x.shape[1]
        sums[norm] += count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for norm, own in sums.items():
        norm.load_state_dict(before[norm], strict=False)
        count, total, squares = ranks.gathered(own[None]).sum(0)
        if count[0]:
            mean = total / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares / count - mean.square()).clamp(min=0))


@torch.inference_mode()
def detect(
    detector: FasterRCNN, images: Sequence[AnnotatedImage], recipe: Recipe, precision: str, ranks: Ranks
) -> list[Found]:
    """The detections in each image, in its own pixels, on the CPU; each rank computes its share and has all.

    Raises:
        UsageError: an image can't be decoded.
        Interrupted: a stop was requested.
    """
    device, limit = detector.mean.device, detector.roi_heads.detections_per_img
    share = list(range(ranks.rank, len(images), ranks.world))
    table = torch.full((-(-len(images) // ranks.world), limit, 6), -1.0, device=device)
    sizes = [resized(image.height, image.width, recipe.test_size, recipe.max_size) for image in images]
    plan = Prefetcher(lambda n: partial(_test_image, images[share[n]], sizes[share[n]]), _AHEAD, len(share))
    with progress(len(share), "detection test", "images", disable=not ranks.first) as bar:
        for number in range(len(share)):
            _expect_no_stop()
            with devices.autocast(device, precision):
                (found,) = detector([devices.send(plan(number), device)])
            rows = torch.cat([found.boxes, found.labels[:, None], found.scores[:, None]], 1)
            table[number, : len(rows)] = rows
            bar.update(1)
    by_rank = ranks.gathered(table[None]).cpu()
    every = [by_rank[index % ranks.world, index // ranks.world] for index in range(len(images))]
    results = []
    for image, size, rows in zip(images, sizes, every, strict=True):
        rows = rows[rows[:, 4] >= 0]
        boxes = scaled(rows[:, :4], size, (image.height, image.width))
        results.append(Found(boxes, rows[:, 4].long(), rows[:, 5]))
    return results


def _test_image(image: AnnotatedImage, size: tuple[int, int]) -> Tensor:
    return resize_pixels(image.pixels(), size)


def _expect_no_stop() -> None:
    if stop_requested():
        raise Interrupted("stopped after the training of detection; the same command goes on from there")
