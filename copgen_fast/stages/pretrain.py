"""Pretrain an encoder on positive pairs by SimCLR's objective (paper Eq. 1; reference facts 3.3 to 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from copgen_fast import artifacts, augmentations, data, devices, loop, losses, seeds
from copgen_fast.config import PretrainConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.loop import StepResult
from copgen_fast.metrics import read_rows
from copgen_fast.pairs.loader import PairBatches, PairDataset
from copgen_fast.stages import Run
from copgen_fast.views import random_views


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
            artifacts.require(run.pairs_folder(method) / "index.json", "pairs")
    for method in run.methods:
        if not run.encoder_file(method).exists():
            pretrain(run, method)


def pretrain(run: Run, method: str) -> None:
    config, options, folder = run.config, run.config.pretrain, run.folder / "pretrain" / method
    dataset = (
        data.RealPairs(data.load(config.data).train_images)
        if method == "real"
        else PairDataset(run.pairs_folder(method))
    )
    batches = PairBatches(dataset, options.batch, config.seed, options.cache_gib, options.workers)
    with seeds.seeded(config.seed, "encoder"):
        model = ContrastiveModel(options.encoder)
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    scaler = devices.grad_scaler(run.device, config.precision)
    policy = augmentations.get(options.augmentation)

    def step(index: int, pair: tuple[Tensor, Tensor]) -> StepResult:
        rate = learning_rate(options, index, batches.steps_per_epoch)
        optimizer.param_groups[0]["lr"] = rate
        images = torch.cat(pair).to(run.device)
        views = random_views(images, policy, seeds.generator(config.seed, "pretrain views", index))
        with devices.autocast(run.device, config.precision):
            embeddings = model(views)
        loss = losses.nt_xent(embeddings, options.temperature, options.base_temperature)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return StepResult(
            {"loss": loss, "lr": torch.tensor(rate, device=run.device)}, {"views": views, "embeddings": embeddings}
        )

    steps = options.epochs * batches.steps_per_epoch
    plan = loop.Plan(f"pretrain {method}", folder, steps, options.batch, config.log_every, config.save_every)
    summary = loop.run(step, batches, {"model": model, "optimizer": optimizer, "scaler": scaler}, plan)
    summary["views_per_s"] = 2 * summary["samples_per_s"]
    artifacts.write_json(folder / "summary.json", read_rows(folder / "metrics.jsonl")[-1] | summary)
    artifacts.write_tensors(run.encoder_file(method), model.encoder.state_dict())
