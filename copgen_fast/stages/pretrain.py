"""Pretrain an encoder on positive pairs by SimCLR's objective (paper Eq. 1; reference facts 3.3 to 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copgen_fast import augmentations, encoders, methods
from copgen_fast.augmentations import make_views
from copgen_fast.config import PretrainConfig, RunConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.errors import UsageError
from copgen_fast.images import sets
from copgen_fast.ops import AugmentParams
from copgen_fast.pairs.format import read_complete_index
from copgen_fast.pairs.read.loader import PairBatch, PairDataset, open_batches
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.stages import Run
from copgen_fast.training import grad_cache, loop, optimizers, sync_bn
from copgen_fast.training.grad_sync import GradientSync
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import read_rows


@dataclass(frozen=True)
class Batch:
    """Everything that differs from step to step, on the device: the step itself draws nothing and never waits for it.

    Attributes:
        images: the joint batch, uint8 [2N, 3, H, W], anchors first.
        params: of its augmentation, 2N rows.
        lr: learning rate of this step.
        labels: classes [N] of the pairs, for a supervised objective.
    """

    images: Tensor
    params: AugmentParams
    lr: float
    labels: Tensor | None = None


@dataclass(frozen=True)
class Learner:
    """The encoder in training and what trains it."""

    f: nn.Module
    """Views [2N, 3, H, W] -> embeddings [2N, D]."""
    t: Callable[[Tensor, AugmentParams], Tensor]
    """Augments the joint batch, a draw of its own for every image."""
    embed: Callable[[Tensor], Tensor]
    """f in the run's precision."""
    nce: Callable[[Tensor, Tensor | None], Tensor]
    """Contrastive loss of a joint batch of embeddings, and its labels."""
    sgd: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    mean: GradientSync
    """Of f's gradients over all ranks."""
    parts: int = 1
    """Parts of a batch whose activations are kept at a time."""


def pretrain_step(learner: Learner, batch: Batch) -> StepResult:
    """One descent of f on InfoNCE(f(t(x)), f(t'(x+))) (paper Eq. 1)."""
    for group in learner.sgd.param_groups:
        group["lr"] = batch.lr
    v = learner.t(batch.images, batch.params)
    learner.sgd.zero_grad(set_to_none=True)

    def objective(embeddings: Tensor) -> Tensor:
        return learner.nce(embeddings, batch.labels)

    h, loss = grad_cache.backward(
        learner.f, learner.embed, v, objective, learner.scaler, learner.parts, learner.mean.held
    )
    optimizers.step(learner.scaler, learner.sgd)
    shown_lr = torch.full((), batch.lr, device=loss.device)
    return StepResult({"loss": loss, "lr": shown_lr}, {"views": v, "embeddings": h})


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Cosine from lr x batch / 256 down to a thousandth of it.

    `reference` holds each epoch at the value the curve has at its end: epochs are counted from 1.
    """
    peak = config.lr * config.batch / 256
    floor = peak / 1000
    if config.schedule == "reference":
        done = (step // steps_per_epoch + 1) / config.epochs
    else:
        done = step / (config.epochs * steps_per_epoch)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def run(run: Run) -> None:
    """Pretrain one encoder per method; each leaves encoder.safetensors, log and checkpoint in RUN/pretrain/METHOD.

    All methods start from the same weights and see the same order and augmentations, so that they differ by
    their positives only.
    """
    if run.config.pretrain.data == "pairs":
        for method in run.methods:
            read_complete_index(run.pairs_folder(method))
    for method in run.methods:
        if not run.encoder_file(method).exists():
            pretrain(run, method)


def pretrain(run: Run, method: str) -> None:
    config, options, folder = run.config, run.config.pretrain, run.folder / "pretrain" / method
    dataset = open_dataset(run, method)
    batches = open_batches(dataset, options, config.seed, run.device, run.ranks.rank, run.ranks.world, options.epochs)
    learner = make_learner(config, run.device, run.ranks)

    def batch(index: int) -> Batch:
        pair = batches(index)
        rate = learning_rate(options, index, batches.steps_per_epoch)
        return make_batch(config, index, pair, rate, run.device, run.ranks)

    def step(index: int, batch: Batch) -> StepResult:
        return pretrain_step(learner, batch)

    steps = options.epochs * batches.steps_per_epoch
    plan = loop.Plan(f"pretrain {method}", folder, steps, options.batch, config.log_every, config.save_every)
    state = {"model": learner.f, "optimizer": learner.sgd, "scaler": learner.scaler}
    summary = loop.run(step, batch, state, plan, ranks=run.ranks)
    skipped = run.ranks.barrier(f"the last batch of {method}", " ".join(map(str, batches.skipped)))
    if run.ranks.first:
        summary["views_per_s"] = 2 * summary["samples_per_s"]
        summary["corrupt_pairs"] = len(set(" ".join(skipped).split()))
        artifacts.write_json(folder / "summary.json", read_rows(folder / "metrics.jsonl")[-1] | summary)
        artifacts.write_tensors(run.encoder_file(method), learner.f.encoder.state_dict())
    run.ranks.barrier(f"the end of {method}'s encoder")


def open_dataset(run: Run, method: str) -> sets.RealPairs | PairDataset:
    """The pairs to pretrain on, with classes where the objective needs them.

    Raises:
        UsageError: it does, and the pairs were made without.
    """
    supervised = run.config.pretrain.loss == "supcon"
    if method == "real":
        real = sets.load(run.config.data)
        return sets.RealPairs(real.train_images, real.train_labels if supervised else None)
    pairs = PairDataset(run.pairs_folder(method))
    if supervised and not pairs.index.identity.get("classes"):
        raise UsageError(
            f"pretrain.loss: supcon needs classes, and the pairs in {pairs.folder} have none: take a class-conditional "
            "generator, or --pretrain.data real"
        )
    return pairs


def make_learner(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Learner:
    """The encoder at its seeded start and its optimiser."""
    options = config.pretrain
    with seeds.seeded(config.seed, "encoder"):
        f = ContrastiveModel(options.encoder)
    f = encoders.prepare(f, device, compiled=config.compile, checkpointed=options.checkpoint)
    f = sync_bn.convert_sync_bn(f, config.bn, ranks, device)
    ranks.broadcast_parameters(f)
    mean = GradientSync(f.parameters(), ranks)
    policy = augmentations.get(options.augmentation)

    def t(images: Tensor, params: AugmentParams) -> Tensor:
        return make_views(images, params, policy)

    def embed(views: Tensor) -> Tensor:
        with devices.autocast(device, config.precision):
            return f(views)

    def nce(embeddings: Tensor, labels: Tensor | None) -> Tensor:
        return methods.nt_xent(embeddings, options.temperature, options.base_temperature, labels, ranks.group)

    return Learner(
        f=f,
        t=t,
        embed=embed,
        nce=nce,
        sgd=optimizers.sgd(
            f.parameters(), options.lr, options.momentum, options.weight_decay, config.optimizer.impl, device
        ),
        scaler=devices.grad_scaler(device, config.precision),
        mean=mean,
        parts=options.accumulate,
    )


def make_batch(
    config: RunConfig, index: int, pair: PairBatch, lr: float, device: torch.device, ranks: Ranks = ALONE
) -> Batch:
    """The batch of step `index`, its augmentation drawn on the CPU from seeds: the same whatever the device.

    Args:
        pair: this rank's rows of the whole batch, whose augmentation is drawn before the rank takes its part.
    """
    images, pairs = pair.images, len(pair.labels) * ranks.world
    params = AugmentParams.sample(
        2 * pairs,
        tuple(images.shape[2:]),
        augmentations.get(config.pretrain.augmentation),
        generator=seeds.generator(config.seed, "pretrain views", index),
    )[ranks.joint_rows(pairs)]
    labels = devices.send(pair.labels, device) if config.pretrain.loss == "supcon" else None
    return Batch(devices.send(images, device), devices.send(params, device), lr, labels)
