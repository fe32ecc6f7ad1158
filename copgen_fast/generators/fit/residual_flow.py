"""Fit the embedded Residual Flow: python -m copgen_fast.generators.fit.residual_flow --out DIR.

Maximum likelihood of dequantised grey levels. The log-determinant's gradient is estimated without bias while
training; the bits per dimension that are printed come from the exact one wherever that is affordable.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from copgen_fast.config import DataConfig
from copgen_fast.errors import NonFiniteError, UsageError, command
from copgen_fast.generators._flow_layers import Estimator
from copgen_fast.generators.fit.fitting import one_thread, update_average, warp
from copgen_fast.generators.residual_flow import LAYOUT, ResidualFlowGenerator
from copgen_fast.images import pictures, sets
from copgen_fast.options import Count, LearningRate, Range, Seed, expect_ranges, parse
from copgen_fast.runtime import artifacts, latents, seeds
from copgen_fast.runtime.progress import progress

AVERAGING = 0.995
DIGIT_LEVELS = 17
EXACT_UP_TO = 256
"""Pixels up to which reports use the exact log-determinant."""
DRAWS = 4
"""Dequantisations over which reports average."""


@dataclass(frozen=True)
class FlowConfig:
    """Fit a Residual Flow to the training split of a grey image set; the same seed gives the same bytes."""

    out: Path
    """Folder for residual_flow.safetensors, residual_flow.json (the figures) and residual_flow_samples.png."""
    data: DataConfig = field(default_factory=lambda: DataConfig("digits", image_size=8))
    """Its first channel is used; `--data.image-size` is the flow's side, at most 32."""
    seed: Seed = 0
    steps: Count = 1500
    """Optimiser steps."""
    batch: Count = 256
    lr: LearningRate = 5e-3
    """Adam's largest learning rate; a cosine takes it to zero."""
    blocks: Annotated[int, Range(*LAYOUT["blocks"])] = 8
    """Invertible residual blocks."""
    width: Annotated[int, Range(*LAYOUT["width"])] = 192
    """Hidden units of a block."""
    depth: Annotated[int, Range(*LAYOUT["depth"])] = 2
    """Matrices of a block."""
    log_det: Literal["estimate", "exact"] = "estimate"
    """Log-determinant while training: the unbiased estimator, or exact, in time cubic in the pixels."""
    jitter: Annotated[float, Range(0, 100)] = 1.6
    """Strength of small random turns, scalings and shifts of the training images; 0: none."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 0.9
    """Latents of N(0, I) are multiplied by this: below 1, samples are more typical and less varied."""


def load_levels(config: DataConfig) -> tuple[Tensor, Tensor, int]:
    """Training and held-out images as float grey levels [N, side, side], and the number of levels.

    Raises:
        UsageError: the data set cannot be read, or the side is not 2 to 32.
    """
    if not 2 <= config.image_size <= 32:
        raise UsageError(f"--data.image-size: expected 2 to 32, got {config.image_size}")
    images = sets.load(config, labelled=False)
    # Only at their own size do the digits keep their 17 levels.
    levels = DIGIT_LEVELS if config.name == "digits" and config.image_size == 8 else 256
    train, test = (
        (split[:, 0].double() * ((levels - 1) / 255)).round().float()
        for split in (images.train_images, images.test_images)
    )
    return train, test, levels


def jitter(grey: Tensor, top: int, strength: float) -> Tensor:
    """Rotate, scale and shift each image [N, S, S] of levels 0 .. top a little; results are levels again.

    At strength 1: 0.05 rad, 3 % and 0.04 of half the side, standard deviations.
    """
    if strength == 0:
        return grey
    return warp(grey.unsqueeze(1), (0.05, 0.03, 0.04), strength).squeeze(1).round().clamp(0, top)


def train(config: FlowConfig, grey: Tensor, levels: int) -> ResidualFlowGenerator:
    """Fit to grey levels [N, S, S] by torch's global generator; returns the weights' running average.

    Raises:
        NonFiniteError: the loss is no longer finite.
    """
    top = levels - 1
    model = ResidualFlowGenerator(grey.shape[1], levels, config.blocks, config.width, config.depth, config.temperature)
    first = jitter(grey[torch.randint(len(grey), (max(10_000, 8 * model.latent_dim),))], top, config.jitter)
    model.flow.initialise(model.logits(model.dequantise(first))[0])
    average = copy.deepcopy(model)
    estimator = Estimator(seeds.generator("fit_flow log-determinant", config.seed))
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    with progress(config.steps, "flow", "steps") as bar:
        for step in range(config.steps):
            batch = jitter(grey[torch.randint(len(grey), (config.batch,))], top, config.jitter)
            model.flow.iterate_norms()
            scans = model.dequantise(batch)
            loss = model.bits_per_dim(scans, estimator if config.log_det == "estimate" else None).mean()
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"bits per dimension are {loss.item()} at step {step}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_average(average, model, AVERAGING, step)
            bar.update(bits_per_dim=loss.item())
    return finish(average)


def finish(model: ResidualFlowGenerator) -> ResidualFlowGenerator:
    """Freeze every spectral norm at its exact value: the file then holds the matrices as they are used."""
    for block in model.flow.blocks:
        for layer in block.layers:
            layer.fold()
    model.flow.iterate_norms(1e-7)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def mean_bits(model: ResidualFlowGenerator, grey: Tensor, seed: int) -> float:
    """Bits per dimension of grey levels [N, S, S], averaged over images and DRAWS dequantisations."""
    generator = seeds.generator("fit_flow report", seed)
    estimator = None if model.latent_dim <= EXACT_UP_TO else Estimator(generator, exact=20)
    total = 0.0
    for _ in range(DRAWS):
        for part in grey.split(512):
            total += model.bits_per_dim(model.dequantise(part, generator), estimator).double().sum().item()
    return total / (DRAWS * len(grey))


def figures(model: ResidualFlowGenerator, grey: Tensor, held_out: Tensor, seed: int) -> dict[str, float]:
    """What `fit` prints: bits per dimension of both splits, and the round trip of 1024 truncated normal latents."""
    z = latents.sample("truncnorm", seed, (1024, model.latent_dim))
    bits = {
        "train_bits_per_dim": mean_bits(model, grey, seed),
        "held_out_bits_per_dim": mean_bits(model, held_out, seed),
    }
    return bits | model.round_trip_error(z)


def fit(config: FlowConfig) -> tuple[Path, dict[str, float]]:
    """Fit, and write the weights, their figures and a picture of 128 samples (8 rows of 16) to `config.out`.

    Returns:
        The path of the weights, and the figures.

    Raises:
        UsageError: a number out of range, or data that cannot be read.
        NonFiniteError: training diverged.
    """
    expect_ranges(config)
    grey, held_out, levels = load_levels(config.data)
    with one_thread(), seeds.seeded("fit_flow", config.seed):
        model = train(config, grey, levels)
        found = figures(model, grey, held_out, config.seed)
        samples = model(latents.sample("truncnorm", config.seed, (128, model.latent_dim)))
    weights = config.out / "residual_flow.safetensors"
    artifacts.write_tensors(weights, model.state_dict())
    artifacts.write_json(config.out / "residual_flow.json", found)
    pictures.write_grid(config.out / "residual_flow_samples.png", samples, columns=16)
    return weights, found


@command
def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    config = parse(FlowConfig, arguments, "python -m copgen_fast.generators.fit.residual_flow")
    weights, found = fit(config)
    print(f"wrote {weights}")
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
