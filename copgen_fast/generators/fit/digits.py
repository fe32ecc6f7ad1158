"""Fit the embedded digits generator: python -m copgen_fast.generators.fit.digits --out DIR.

A flow is matched from the latent prior to the real scans, latents coupled to scans by optimal transport;
the generator then learns the flow's end points in one step. The coupling is what makes the latent space
smooth: every latent moves as little as it can, so that neighbours mostly stay in one class.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import command
from copgen_fast.generators.digits import LATENT_DIM, SCAN, DigitsGenerator, Residual
from copgen_fast.generators.fit.fitting import one_thread, update_average, warp
from copgen_fast.images import pictures
from copgen_fast.images.sets import digits
from copgen_fast.options import Count, Seed, expect_ranges, parse
from copgen_fast.runtime import artifacts, latents, seeds
from copgen_fast.runtime.progress import progress

BATCH = 256
PEAK_LR = 2e-3
FLOW_WIDTH = 384
HEUN_STEPS = 12
PAIRS = 40_000
SHARPEN = 1.0


@dataclass(frozen=True)
class FitConfig:
    """Fit the digits generator to scikit-learn's training scans; the same seed gives the same bytes."""

    out: Path
    """Folder for digits.safetensors and digits_samples.png."""
    seed: Seed = 0
    steps: Count = 6000
    """Optimiser steps of the flow, and then as many of the generator."""


class Flow(nn.Module):
    """Velocity at time t (0: latents, 1: scans) of points x."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0, 3, 16).exp())
        self.inward = nn.Linear(SCAN * SCAN + 32, FLOW_WIDTH)
        self.blocks = nn.Sequential(Residual(FLOW_WIDTH), Residual(FLOW_WIDTH))
        self.outward = nn.Linear(FLOW_WIDTH, SCAN * SCAN)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [N, 64], t [N, 1] -> [N, 64]."""
        phase = t * self.frequencies
        hidden = self.blocks(self.inward(torch.cat([x, phase.sin(), phase.cos()], dim=1)))
        return self.outward(F.silu(hidden))


def training_scans() -> Tensor:
    """The real training scans, float32 [1437, 64] in [-1, 1]."""
    images = digits(image_size=SCAN).train_images[:, 0]
    return images.flatten(1).float() / 127.5 - 1


def jitter(scans: Tensor) -> Tensor:
    """Rotate, scale and shift each scan [N, 64] a little (a fifth of a pixel): 1437 would be learnt by heart."""
    images = scans.view(-1, 1, SCAN, SCAN) + 1  # the background is -1
    return (warp(images, (0.03, 0.015, 0.02)) - 1).clamp(-1, 1).flatten(1)


def prior(n: int) -> Tensor:
    """Latents [n, 64] of N(0, 1) truncated to [-2, 2], from torch's global generator."""
    return nn.init.trunc_normal_(torch.empty(n, LATENT_DIM), 0.0, 1.0, -2.0, 2.0)


def couple(z: Tensor, scans: Tensor) -> Tensor:
    """Reorder `scans` [N, 64] so that the summed squared distance to `z` [N, 64], row by row, is least."""
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(-(z @ scans.T).numpy())
    return scans[torch.from_numpy(order)]


def descend(model: nn.Module, steps: int, title: str) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Yield `steps` times (step, Adam under a cosine schedule), with gradients at zero; the caller takes the step."""
    optimizer = torch.optim.Adam(model.parameters(), PEAK_LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(steps, title, "steps") as bar:
        for step in range(steps):
            optimizer.zero_grad()
            yield step, optimizer
            schedule.step()
            bar.update()


def fit_flow(scans: Tensor, steps: int) -> tuple[Flow, Flow]:
    """Flow matching with minibatch optimal transport.

    Returns:
        The averaged flow, and the same after an eighth of the steps.
    """
    flow = Flow()
    average = copy.deepcopy(flow)
    early = average
    for step, optimizer in descend(flow, steps, "flow"):
        z, t = prior(BATCH), torch.rand(BATCH, 1)
        x = couple(z, jitter(scans[torch.randint(len(scans), (BATCH,))]))
        F.mse_loss(flow(torch.lerp(z, x, t), t), x - z).backward()
        optimizer.step()
        update_average(average, flow, 0.998, step)
        if step == steps // 8:
            early = copy.deepcopy(average)
    return average, early


@torch.no_grad()
def transport(flow: Flow, early: Flow, z: Tensor) -> Tensor:
    """Follow the flow from latents [N, 64] to scans [N, 64] in [-1, 1] by Heun's method.

    The velocity is pushed away from the early flow's, which blurs what lies between two classes
    (autoguidance, Karras et al. 2024).
    """

    def velocity(x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x), 1), time)
        late = flow(x, t)
        return late + SHARPEN * (late - early(x, t))

    x, h = z, 1 / HEUN_STEPS
    for k in range(HEUN_STEPS):
        first = velocity(x, k * h)
        second = velocity(x + h * first, (k + 1) * h)
        x = x + h / 2 * (first + second)
    return x.clamp(-1, 1)


def fit_generator(z: Tensor, scans: Tensor, steps: int) -> DigitsGenerator:
    """Regress the generator's 8x8 scans on pairs of latents [N, 64] and scans [N, 64]."""
    generator = DigitsGenerator()
    for _, optimizer in descend(generator, steps, "generator"):
        rows = torch.randint(len(z), (BATCH,))
        F.mse_loss(generator.scan(z[rows]).flatten(1), scans[rows]).backward()
        optimizer.step()
    return generator


def fit(config: FitConfig) -> Path:
    """Fit, and write digits.safetensors and digits_samples.png (8 rows of 16) to the folder `config.out`.

    Returns:
        The path of the weights.

    Raises:
        UsageError: `steps` is not positive.
    """
    expect_ranges(config)
    with one_thread(), seeds.seeded("fit_generator", config.seed):
        flow, early = fit_flow(training_scans(), config.steps)
        z = prior(min(PAIRS, BATCH * config.steps))
        scans = torch.cat([transport(flow, early, part) for part in z.split(1000)])
        generator = fit_generator(z, scans, config.steps).eval()
    weights = config.out / "digits.safetensors"
    artifacts.write_tensors(weights, generator.state_dict())
    with torch.no_grad():
        samples = generator(latents.sample("truncnorm", config.seed, (128, LATENT_DIM)))
    pictures.write_grid(config.out / "digits_samples.png", samples, columns=16)
    return weights


@command
def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    config = parse(FitConfig, arguments, "python -m copgen_fast.generators.fit.digits")
    print(f"wrote {fit(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
