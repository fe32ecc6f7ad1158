"""Area navigator: the stage's whole step beside the reference code's form of it, from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.profiler import record_function

from bench.areas import _steps
from bench.areas.generator import Case as GeneratorCase
from bench.areas.generator import random_bigbigan
from bench.baselines.navigator import ReferenceNavigator
from bench.harness import Call
from bench.rows import Options, Row
from copgen_fast import generators
from copgen_fast.config import EncoderConfig, NavigatorConfig, RunConfig
from copgen_fast.errors import CopgenError
from copgen_fast.positives.navigator import untrained
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import devices, seeds
from copgen_fast.stages.navigator import Players, draw_batch, draw_latents, make_players, make_step

PAPER = NavigatorConfig(estimator=EncoderConfig("resnet18", "imagenet"))


@dataclass(frozen=True)
class Case:
    """A step of `batch` latents of a generator, BigBiGAN with random weights or the embedded digits.

    Attributes:
        precisions: those of a GPU, where the generator is at level half; a CPU has float32, and bf16 if supported.
        stacked: the peer stacks its views, as assigning them one by one would take minutes a step.
        side, width: of the generator's images and of its last block.
    """

    generator: Literal["bigbigan", "digits"]
    batch: int
    side: int
    options: NavigatorConfig
    precisions: tuple[str, ...] = ("fp16", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    stacked: bool = False
    width: int = 96

    def __str__(self) -> str:
        return f"{self.generator} B={self.batch} {self.side}px"

    def config(self, precision: str) -> RunConfig:
        return RunConfig(precision=precision, navigator=replace(self.options, batch=self.batch))

    def published(self) -> nn.Module:
        """The published generator, with the embedded or with random weights."""
        if self.generator == "bigbigan":
            return random_bigbigan(GeneratorCase(self.batch, width=self.width, resolution=self.side))
        return generators.build("digits")


CASES = (
    Case("digits", 128, 32, PRESETS["quickstart"].navigator),
    Case("bigbigan", 8, 128, PAPER, devices=("cpu",)),
    Case("bigbigan", 176, 128, PAPER, devices=("cuda",)),
    Case("bigbigan", 256, 128, PAPER, devices=("cuda",), stacked=True),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, one for each precision."""
    return _steps.rows(_AREA, CASES, options)


def profiles(options: Options) -> Iterator[str]:
    """Lines of every case's time by phase."""
    return _steps.profiles(_AREA, CASES, options)


def our_steps(case: Case, device: torch.device) -> Iterator[_steps.Step]:
    """The stage's step in each precision, draws from seeds included, on the same latents each time.

    On a GPU also as one CUDA graph, in the precision that is the stage's default there.
    """
    published = case.published().to(device)
    default = devices.resolve_precision("auto", device)
    for precision in _steps.precisions(device, case.precisions):
        try:
            yield _steps.Step(precision, our_step(case, published, precision, device))
            if device.type == "cuda" and precision == default:
                yield _steps.Step(precision, our_step(case, published, precision, device, graph=True), "CUDA graph")
        except CopgenError as error:  # half precision that changes images too much
            print(f"left out: {case}, {precision} ({error})", flush=True)


def our_step(case: Case, published: nn.Module, precision: str, device: torch.device, graph: bool = False) -> Call:
    """One call of the stage's step through the optimised generator."""
    config = case.config(precision)
    config = replace(config, navigator=replace(config.navigator, graph=graph))
    # At the stage's level and dtype: on a GPU float16, whose loss it scales.
    G = generators.optimize(published, "exact" if precision == "fp32" else "half")
    update = make_step(_steps.run(config, device), players(config, G, device))

    def step() -> object:
        with record_function("data"):
            batch = draw_batch(config, G, 0, device)
        return update(batch)

    return step


def players(config: RunConfig, G: nn.Module, device: torch.device) -> Players:
    """The players at their seeded start."""
    T_z = untrained(G.latent_dim, config.navigator, config.seed).to(device)
    return make_players(_steps.run(config, device), G, T_z)


def their_step(case: Case, device: torch.device) -> dict[str, Call]:
    """The reference code's form by its name, from our step's weights and on its latents."""
    config, G = case.config("fp32"), case.published().to(device)
    start = players(config, G, device)
    theirs = ReferenceNavigator(G, start.T_z, start.f, config.navigator, case.stacked)
    seed = seeds.derive32(config.seed, "navigator latents", 0)

    def step() -> object:
        return theirs.step(draw_latents(G, seed, case.batch, device))

    return {f"reference form, fp32{', views stacked' if case.stacked else ''}": step}


_AREA = _steps.Area("navigator", "generator three times, estimator", our_steps, their_step)
