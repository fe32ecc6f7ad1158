"""Estimated duration and memory of the paper's two runs on a device, from a few steps of their stages.

Weights and images are random, on which a step's duration does not depend. Reading pairs is left out, and so is
thermal throttling.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast import evals
from copgen_fast.config import EncoderConfig, NavigatorConfig, PretrainConfig, RunConfig
from copgen_fast.encoders import Encoder
from copgen_fast.errors import CopgenError
from copgen_fast.generators import optimize
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.pairs.read.batch import NO_LABEL, PairBatch
from copgen_fast.positives.navigator import untrained
from copgen_fast.runtime import devices, seeds
from copgen_fast.runtime.memory import available_memory, peak_memory
from copgen_fast.stages import Run, navigator, pretrain

Step = Callable[[], object]

# The paper's: 200K latents; 100 epochs of 1.3M pairs, 200 of 130K; training images of ImageNet and of 100 classes.
SAMPLES, PAIRS, PAIRS_100 = 200_000, 130_000_000, 26_000_000
IMAGES, IMAGES_100 = 1_281_167, 126_689
SIDE = 128
# Batches whose memory is measured, and seconds of steps that are timed.
BATCHES = {"cpu": (2, 4), "cuda": (16, 48)}
SECONDS = 5.0
_LEAST_STEPS = 2
# Fraction of the available memory that a run should leave free.
_SPARE = 0.05


@dataclass(frozen=True)
class Work:
    """One of the paper's runs, as steps of any batch size.

    Attributes:
        name, what: the stage, and a description of its networks and precision.
        samples: of the whole run; `batch` is the paper's.
        step: from a batch size to a function that computes one step.
        also: samples of other runs of the same steps, by what they are.
    """

    name: str
    what: str
    samples: int
    batch: int
    step: Callable[[int], Step]
    also: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """Estimated duration and largest batch of a run.

    Attributes:
        batch, steps: size and number of the timed steps.
        seconds: per sample, of the median step; `fastest` and `slowest` likewise.
        hours: of the whole run, at the median.
        largest_batch: largest batch that fits into `available_mb`, by a line through `peak_mb` (batch size: 10^6
            bytes of a step beside weights and optimisers); None where memory cannot be measured.
    """

    name: str
    what: str
    samples: int
    batch: int
    steps: int
    seconds: float
    fastest: float
    slowest: float
    hours: float
    peak_mb: dict[int, float]
    available_mb: float | None
    largest_batch: int | None
    also: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Three lines of text, and one for each of `also`."""
        slow, fast = 1 / self.slowest, 1 / self.fastest
        hours = self.samples / 3600
        lines = [
            f"  {self.name}: {self.what}",
            f"    {1 / self.seconds:.3g} samples/s ({slow:.3g} to {fast:.3g} in {self.steps} steps of {self.batch}): "
            f"{duration(self.hours)} for {self.samples:,} samples "
            f"({duration(hours * self.fastest)} to {duration(hours * self.slowest)})",
        ]
        for name, samples in self.also.items():
            lines.append(f"    {name}: {duration(self.seconds * samples / 3600)} for {samples:,} samples")
        if self.largest_batch is None:
            return "\n".join([*lines, "    largest batch: memory cannot be measured here"])
        (small, low), (large, high) = self.peak_mb.items()
        lines.append(
            f"    largest batch: about {self.largest_batch:,} in the {self.available_mb / 1e3:.1f} GB available, by a "
            f"line through {low / 1e3:.2f} GB at {small} and {high / 1e3:.2f} GB at {large}"
        )
        return "\n".join(lines)


def duration(hours: float) -> str:
    """A time in minutes, hours or days."""
    if hours < 2:
        return f"{hours * 60:.0f} min"
    if hours < 72:
        return f"{hours:.1f} h"
    return f"{hours / 24:.1f} days" if hours < 240 else f"{hours / 24:,.0f} days"


def estimates(device: torch.device) -> list[Callable[[], Estimate]]:
    """Functions that estimate the navigator with BigBiGAN-128, and ResNet-50's pretraining and linear evaluation."""
    works = (navigator_work, pretrain_work, probe_work)
    return [lambda make=make: estimate(make(device), device) for make in works]


def estimate(work: Work, device: torch.device, seconds: float = SECONDS) -> Estimate:
    """Time steps for about `seconds`, and measure how their memory grows with the batch."""
    small, large = BATCHES[device.type]
    work.step(small)()  # allocates the optimisers' state
    peaks = {batch: peak_memory(work.step(batch), device) for batch in (small, large)}
    available = available_memory(device)
    fits = None
    if available is not None and None not in peaks.values():
        fits = largest_batch(peaks, available * (1 - _SPARE))
    # On a GPU the paper's, where it fits with a margin for the line's error.
    batch = large if device.type == "cpu" or fits is None else max(1, min(work.batch, int(0.8 * fits)))
    took = [s / batch for s in timed(work.step(batch), device, seconds)]
    median = statistics.median(took)
    return Estimate(
        name=work.name,
        what=work.what,
        samples=work.samples,
        batch=batch,
        steps=len(took),
        seconds=median,
        fastest=min(took),
        slowest=max(took),
        hours=median * work.samples / 3600,
        peak_mb={} if None in peaks.values() else peaks,
        available_mb=available,
        largest_batch=fits,
        also=work.also,
    )


def timed(step: Step, device: torch.device, seconds: float) -> list[float]:
    """Seconds of each of two or more calls that fill `seconds`, after a warm-up on a GPU."""

    def once() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if device.type == "cuda":  # libraries choose their algorithms
        once()
    took: list[float] = []
    while len(took) < _LEAST_STEPS or sum(took) + min(took) < seconds:
        took.append(once())
    return took


def largest_batch(peaks: dict[int, float], available: float) -> int | None:
    """Batch size at which the line through two batches' peaks reaches `available`; None if it does not rise."""
    (small, low), (large, high) = sorted(peaks.items())
    slope = (high - low) / (large - small)
    return int((available - low) / slope + small) if slope > 0 else None


def navigator_work(device: torch.device) -> Work:
    """The paper's navigator: BigBiGAN-128, a ResNet-18 estimator, SimCLR's augmentation."""
    level = "exact" if device.type == "cpu" else "half"
    published = _random_bigbigan(device)
    try:
        G = _rewritten(published, level)
    except CopgenError:  # half precision changes images of these weights too much
        level = "exact"
        G = _rewritten(published, level)
    del published
    return navigator_work_of(G, EncoderConfig("resnet18", "imagenet"), f"BigBiGAN-{SIDE}, {level}; ResNet-18", device)


def navigator_work_of(G: nn.Module, estimator: EncoderConfig, what: str, device: torch.device) -> Work:
    """The navigator stage's step with any generator."""
    options = NavigatorConfig(estimator=estimator)
    config = RunConfig(navigator=options)
    T_z = untrained(G.latent_dim, options, config.seed).to(device)
    players = navigator.make_players(Run(config, Path(), device), G, T_z)
    index = itertools.count()

    def step(batch: int) -> Step:
        of_batch = replace(config, navigator=replace(options, batch=batch))
        return lambda: navigator.alternating_step(players, navigator.draw_batch(of_batch, G, next(index), device))

    precision = devices.resolve_precision(config.precision, device)
    return Work("navigator", f"{what}, {precision}", SAMPLES, options.batch, step)


def pretrain_work(device: torch.device) -> Work:
    """The paper's ResNet-50 on pairs of 128 x 128 pixels."""
    work = pretrain_work_of(EncoderConfig("resnet50", "imagenet"), f"ResNet-50, {SIDE} px", SIDE, device)
    return replace(work, also={"preset imagenet100": PAIRS_100})


def probe_work(device: torch.device) -> Work:
    """60 epochs of `linear-augmented` on ImageNet with the paper's ResNet-50."""
    return probe_work_of(EncoderConfig("resnet50", "imagenet"), f"ResNet-50, {SIDE} px", SIDE, device)


def probe_work_of(config: EncoderConfig, what: str, side: int, device: torch.device) -> Work:
    """The steps of `linear-augmented` with any encoder: encoding, and training of the classifier."""
    encoder = Encoder(config).eval()
    frozen = evals.freeze(encoder, Run(RunConfig(), Path(), device))
    classifier = nn.Linear(encoder.feature_dim, 1000).to(device)
    sgd = torch.optim.SGD(classifier.parameters(), 1.75, 0.9)

    def step(batch: int) -> Step:
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        labels = torch.arange(batch, device=device) % 1000

        def train() -> None:
            sgd.zero_grad()
            F.cross_entropy(classifier(frozen.encode(frozen.normalize(images))), labels).backward()
            sgd.step()

        return train

    also = {
        "preset imagenet100": 60 * IMAGES_100,
        "linear-grid instead": 4 * IMAGES,
        "linear-grid instead, imagenet100": 4 * IMAGES_100,
    }
    return Work("linear-augmented", f"{what}, fp32", 60 * IMAGES, 224, step, also)


def pretrain_work_of(encoder: EncoderConfig, what: str, side: int, device: torch.device) -> Work:
    """The pretraining stage's step with any encoder, on uint8 pairs in the host's memory."""
    options = PretrainConfig(encoder=encoder)
    config = RunConfig(pretrain=options)
    learner = pretrain.make_learner(config, device)
    index = itertools.count()

    def step(batch: int) -> Step:
        random = seeds.generator("doctor pairs")
        images = torch.randint(0, 256, (2, batch, 3, side, side), dtype=torch.uint8, generator=random)
        pairs = PairBatch(*images, torch.full((batch,), NO_LABEL))
        return lambda: pretrain.pretrain_step(
            learner, pretrain.make_batch(config, next(index), pairs, options.lr, device)
        )

    precision = devices.resolve_precision(config.precision, device)
    return Work("pretrain", f"{what}, {precision}", PAIRS, options.batch, step)


def _random_bigbigan(device: torch.device) -> BigBiGAN:
    with seeds.seeded("doctor generator"):
        return BigBiGAN(resolution=SIDE).eval().requires_grad_(False).to(device)


def _rewritten(published: BigBiGAN, level: str) -> nn.Module:
    """The result of `optimize`; on the CPU without its comparison, which takes as long as the timed steps."""
    if published.linear.weight.device.type != "cpu":
        return optimize(published, level)
    with torch.no_grad():
        return published.rewritten().eval()
