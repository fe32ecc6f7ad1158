"""Pretrain an encoder on positive pairs by a self-supervised method (SimCLR: paper Eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from copgen_fast import augmentations, encoders, methods
from copgen_fast.augmentations import JigsawParams
from copgen_fast.config import PretrainConfig, RunConfig, pairs_drawn
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.images import sets
from copgen_fast.images.real_pairs import RealPairs, real_pairs
from copgen_fast.images.views import Centre
from copgen_fast.methods import Method
from copgen_fast.ops import AugmentParams, AugmentPolicy
from copgen_fast.pairs.online import OnlinePairs
from copgen_fast.pairs.read.loader import PairBatch, PairDataset, open_batches
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.stages import _online
from copgen_fast.stages.pairs import expect_own
from copgen_fast.stages.run import Run, expect_comparable
from copgen_fast.training import cuda_graph, grad_cache, loop, optimizers, sync_bn
from copgen_fast.training.grad_sync import data_parallel, no_sync
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import Row, last_row


@dataclass(frozen=True)
class Inputs:
    """Tensors of one pretraining step, on the device; the step draws nothing and never waits for the device.

    Attributes:
        images: the joint batch, uint8 [(1 + K) N, 3, H, W], anchors first; K = 1 or the method takes several positives.
        params: of its augmentation, as many rows.
        labels: classes [N] of the pairs, for a method that takes them.
        jigsaw: of the anchors' jigsaw views, N rows, for a method that takes them.
    """

    images: Tensor
    params: AugmentParams
    labels: Tensor | None
    jigsaw: JigsawParams | None


@dataclass(frozen=True)
class Batch:
    """Inputs of one pretraining step: `Inputs`' tensors, and numbers.

    Attributes:
        lr: learning rate of this step.
        progress: share of the training that is done, 0 .. 1.
        seed: for what the method draws at random.
    """

    images: Tensor
    params: AugmentParams
    lr: float
    progress: float
    labels: Tensor | None = None
    seed: int = 0
    jigsaw: JigsawParams | None = None

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.images, self.params, self.labels, self.jigsaw)


@dataclass(frozen=True)
class Learner:
    """A method with its optimiser and everything else that a pretraining step needs.

    Attributes:
        policy: of the augmentations t_x and t_x'.
        autocast: context of the run's precision.
        parts: parts of a batch, of which one's activations are kept at a time.
    """

    method: Method
    policy: AugmentPolicy
    autocast: Callable[[], AbstractContextManager]
    sgd: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks
    parts: int


def pretrain_step(learner: Learner, batch: Batch) -> StepResult:
    """One optimiser step on the method's loss of the views v = t_x(x) and v_prime = t_x'(x_prime)."""
    set_learning_rate(learner.sgd, batch.lr)
    learner.method.before_step(batch.seed)
    return _finished(learner, batch, _descend(learner, batch.inputs))


def _descend(learner: Learner, batch: Inputs) -> StepResult:
    """Loss, and views, outputs and targets, of an optimiser step at the learning rate that is set."""
    m = learner.method
    v = augmentations.make_views(batch.images, batch.params, learner.policy)  # of x, then of x_prime
    if batch.jigsaw is not None:
        anchors = batch.images[: len(batch.jigsaw.order)]
        v = torch.cat([v, augmentations.jigsaw_views(anchors, batch.jigsaw, learner.policy)])
    with torch.no_grad(), learner.autocast():
        targets = m.targets(v)

    def loss(online: tuple[Tensor, ...]) -> Tensor:
        return m.loss(online, targets, batch.labels, learner.ranks.group)

    learner.sgd.zero_grad(set_to_none=True)
    split = {"parts": learner.parts, "of_pair": 1 + m.positives + m.jigsaw}
    online, value = grad_cache.backward(
        m, v, loss, learner.scaler, **split, autocast=learner.autocast, no_sync=partial(no_sync, m)
    )
    optimizers.step(learner.scaler, learner.sgd)
    named = {f"output {number} of the method": output for number, output in enumerate(online)}
    named |= {f"target {number}": target for number, target in enumerate(targets)}
    return StepResult({"loss": value}, {"views": v} | named)


def _finished(learner: Learner, batch: Batch, step: StepResult) -> StepResult:
    """What follows the optimiser: the method's averages, queue and metrics."""
    m, loss = learner.method, step.metrics["loss"]
    targets = {name: x for name, x in step.watched.items() if name.startswith("target ")}
    watched = {name: x for name, x in step.watched.items() if name not in targets}
    _, *online = watched.values()  # the views come first
    m.after_step(tuple(online), tuple(targets.values()), batch.progress)
    return StepResult({"loss": loss, "lr": torch.full((), batch.lr, device=loss.device)} | m.metrics(), watched)


def make_step(learner: Learner, graph: bool, device: torch.device) -> Callable[[Batch], StepResult]:
    """`pretrain_step` as a function of the batch; with `graph` all but what the method does after it is a CUDA graph.

    The method's own steps stay outside, as they may depend on numbers that a graph would keep: the share of the
    training that is done, say.
    """
    step = partial(pretrain_step, learner)
    if not graph:
        return step
    reason = cuda_graph.obstacle(device, (learner.sgd,))
    if reason is None and type(learner.method).before_step is not Method.before_step:
        reason = "the method draws at random in each step"
    if reason is not None:
        if learner.ranks.first:
            print(f"pretrain.graph: not used, {reason}", flush=True)
        return step
    rate = torch.zeros((), device=device)

    def descend(inputs: Inputs) -> StepResult:
        set_learning_rate(learner.sgd, rate)  # a tensor, which each replay reads
        return _descend(learner, inputs)

    graphed = cuda_graph.GraphedStep(descend, (learner.method,), (learner.sgd,), learner.scaler)

    def replay(batch: Batch) -> StepResult:
        rate.fill_(batch.lr)
        result = _finished(learner, batch, graphed(batch.inputs))
        set_learning_rate(learner.sgd, batch.lr)  # for checkpoints
        # The next replay overwrites what the method measured.
        return replace(result, metrics={name: value.clone() for name, value in result.metrics.items()})

    return replay


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Set the learning rate of all groups of parameters except those with `"scheduled": False`."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = lr


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Cosine from lr x batch / 256 down to a thousandth of it, after a linear rise to it if there is a warm-up.

    `reference` holds each epoch at the value the curve has at its end: epochs are counted from 1.
    """
    peak = config.lr * config.batch / 256
    floor = peak / 1000
    steps = config.epochs * steps_per_epoch
    rise = round(config.warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    if config.schedule == "reference":
        done = (step // steps_per_epoch + 1) / config.epochs
    else:
        done = (step - rise) / (steps - rise)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def run(run: Run) -> None:
    """Pretrain one encoder per source; each leaves encoder.safetensors, log and checkpoint in
    RUN/pretrain/SOURCE/METHOD.

    All start from the same weights and see the same order and augmentations, so that they differ by their positives
    only.
    """
    if run.config.pretrain.data == "pairs":
        for source in run.sources:
            expect_own(run, source)
    drawn = _online.open_pairs(run) if run.config.pretrain.data == "online" else {}
    for source in run.sources:
        if not run.encoder_file(source).exists():
            pretrain(run, source, drawn.get(source))


def pretrain(run: Run, source: str, drawn: OnlinePairs | None = None) -> None:
    """Pretrain the encoder of one source, on pairs that are drawn meanwhile or on those that `open_dataset` finds."""
    config, options, folder = run.config, run.config.pretrain, run.pretrain_folder(source)
    dataset = open_dataset(run, source) if drawn is None else drawn
    if isinstance(dataset, RealPairs):
        options = replace(options, on_corrupt=config.data.on_corrupt)
    batches = open_batches(dataset, options, config.seed, run.device, run.ranks.rank, run.ranks.world, options.epochs)
    labelled = has_classes(run, dataset)
    count = len(dataset) if drawn is None else pairs_drawn(config)
    several = 1 if isinstance(dataset, RealPairs) else dataset.positives
    learner = make_learner(config, run.device, run.ranks, count, several)
    steps = options.epochs * batches.steps_per_epoch

    def batch(index: int) -> Batch:
        pair = batches(index)
        rate = learning_rate(options, index, batches.steps_per_epoch)
        return make_batch(config, index, pair, rate, run.device, run.ranks, index / steps, labelled)

    step = make_step(learner, options.graph, run.device)
    name = label(source)
    plan = loop.Plan(f"pretrain {name}", folder, steps, options.batch, config.log_every, config.save_every)
    state = {"method": learner.method, "optimizer": learner.sgd, "scaler": learner.scaler}
    summary = loop.run(lambda index, batch: step(batch), batch, state, plan, CollapseWatch(name, run.ranks), run.ranks)
    skipped = run.ranks.barrier(f"the last batch of {name}", " ".join(map(str, batches.skipped)))
    if run.ranks.first:
        summary["views_per_s"] = (1 + learner.method.positives) * summary["samples_per_s"]
        summary["corrupt_pairs"] = len(set(" ".join(skipped).split()))
        if drawn is not None:
            summary |= _online.distances(run, drawn)
        artifacts.write_record(folder / "summary.json", last_row(folder / "metrics.jsonl") | summary)
        artifacts.write_tensors(run.encoder_file(source), learner.method.encoder.state_dict(), **run.encoder_of(source))
    run.ranks.barrier(f"the end of {name}'s encoder")


def open_dataset(run: Run, source: str) -> RealPairs | PairDataset:
    """The pairs to pretrain on, with classes where the method needs them.

    Raises:
        UsageError: it does, and the pairs were made without, or their classes leave nothing to compare.
    """
    method = run.config.method.name
    supervised = methods.needs_labels(method)
    if source == "real":
        real = sets.open_set(run.config.data, ("train",), supervised)
        return real_pairs(real.splits["train"], Centre(run.config.data.image_size), takes_labels(method))
    pairs = PairDataset(run.pairs_folder(source), check=source not in run.checked)
    if supervised and not pairs.classes:
        raise UsageError(
            f"--method {method} needs classes, and the pairs in {pairs.folder} have none: take a class-conditional "
            "generator, or --pretrain.data real"
        )
    if supervised:
        of_class, count = pairs.index.identity["samples_per_class"], pairs.index.count
        expect_comparable(method, min(pairs.classes, -(-count // of_class)), count)
    return pairs


def takes_labels(method: str) -> bool:
    return methods.needs_labels(method) or methods.uses_labels(method)


def has_classes(run: Run, dataset: RealPairs | PairDataset | OnlinePairs) -> bool:
    """Whether the method takes the classes of these pairs."""
    if not takes_labels(run.config.method.name):
        return False
    if isinstance(dataset, RealPairs):
        return dataset.labelled
    return bool(dataset.classes)


@dataclass
class CollapseWatch:
    """Warns once when a method's embeddings are almost the same for all images; called with each row logged last."""

    name: str
    ranks: Ranks
    warned: bool = False

    def __call__(self, row: Row) -> bool:
        if not self.warned and has_collapsed(row):
            self.warned = True
            if self.ranks.first:
                print(f"warning: pretrain {self.name}: step {row['step']}: {collapse_warning(row)}", flush=True)
        return False  # never stops the loop


def has_collapsed(row: Row) -> bool:
    """Whether a row of the log tells of collapsed embeddings."""
    return row.get("embedding_std", 1.0) < methods.COLLAPSED


def collapse_warning(row: Row) -> str:
    """What to say then."""
    return (
        f"the embeddings collapse, their standard deviation is {row['embedding_std']:.3f} of that of uniform "
        "directions: try a smaller --pretrain.lr or a larger batch"
    )


def make_learner(
    config: RunConfig, device: torch.device, ranks: Ranks = ALONE, pairs: int | None = None, positives: int = 1
) -> Learner:
    """The method around a new encoder, both initialised from the run's seed, and its optimiser.

    Args:
        pairs: in the data set; None: as many as the pairs stage makes.
        positives: of each of its anchors.
    """
    options = config.pretrain
    setting = methods.Setting(pairs_drawn(config) if pairs is None else pairs, options.batch)
    with seeds.seeded(config.seed, "encoder"):
        method = methods.build(config.method.name, Encoder(options.encoder), config.method.options, setting)
    if methods.several_positives(config.method.name):
        method.positives = positives
    method = encoders.prepare(method, device, compiled=config.compile, checkpointed=options.checkpoint)
    method = sync_bn.convert_sync_bn(method, config.bn, ranks, device)
    method = data_parallel(method, ranks)
    peak = options.lr * options.batch / 256
    make = optimizers.lars if options.optimizer == "lars" else optimizers.sgd
    return Learner(
        method=method,
        policy=augmentations.get(options.augmentation),
        autocast=partial(devices.autocast, device, config.precision),
        sgd=make(method.param_groups(), peak, options.momentum, options.weight_decay, config.optimizer.impl, device),
        scaler=devices.grad_scaler(device, config.precision),
        ranks=ranks,
        parts=options.accumulate,
    )


def make_batch(
    config: RunConfig,
    index: int,
    pair: PairBatch,
    lr: float,
    device: torch.device,
    ranks: Ranks = ALONE,
    progress: float = 0.0,
    labelled: bool | None = None,
) -> Batch:
    """The batch of step `index`, its augmentation drawn on the CPU from seeds: the same whatever the device.

    Args:
        pair: this rank's rows of the whole batch, whose augmentation is drawn before the rank takes its part.
        labelled: whether the method takes the pairs' classes; None: where it needs them.
    """
    pairs = len(pair.labels) * ranks.world
    if len(pair.each_positive) > 1 and not methods.several_positives(config.method.name):
        drawn = seeds.generator(config.seed, "pretrain positive", index)
        which = torch.randint(len(pair.each_positive), (pairs,), generator=drawn)
        pair = pair.with_one_positive(which[ranks.rows(pairs)])
    images, views = pair.images, 1 + len(pair.each_positive)
    size, policy = tuple(images.shape[2:]), augmentations.get(config.pretrain.augmentation)
    params = AugmentParams.sample(
        views * pairs,
        size,
        policy,
        generator=seeds.generator(config.seed, "pretrain views", index),
    )[ranks.joint_rows(pairs, views)]
    labelled = methods.needs_labels(config.method.name) if labelled is None else labelled
    labels = devices.send(pair.labels, device) if labelled else None
    seed = seeds.derive(config.seed, "method", index)
    jigsaw = None
    if methods.takes_jigsaw(config.method.name, config.method.options):
        drawn = seeds.generator(config.seed, "pretrain jigsaw", index)
        jigsaw = JigsawParams.sample(pairs, size, policy, drawn)[ranks.rows(pairs)]
        jigsaw = devices.send(jigsaw, device)
    return Batch(devices.send(images, device), devices.send(params, device), lr, progress, labels, seed, jigsaw)
