"""What the doctor says of one generator: its check, samples, how long the stages would take, shards or online."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast import generators
from copgen_fast.config import EncoderConfig, GeneratorConfig, NavigatorConfig, PairsConfig, PretrainConfig
from copgen_fast.doctor import estimates, online
from copgen_fast.doctor.estimates import Step, Work
from copgen_fast.images import pictures
from copgen_fast.pairs.format import to_uint8
from copgen_fast.registry import label
from copgen_fast.runtime import machine
from copgen_fast.stages._draws import draw_labels

COLUMNS, SAMPLES = 8, 32
SMALL, LARGEST = 64, 256  # pixels a side: below, encoders have small stems; beyond, pairs are stored smaller


def examine(
    config: GeneratorConfig,
    device: torch.device,
    grid: Path,
    quick: bool,
    seconds: float = estimates.SECONDS,
    encoder: EncoderConfig | None = None,
) -> dict[str, object]:
    """Print the report as it is made and write the grid; returns it.

    Args:
        quick: leave out the estimates.
        seconds: of each estimate's steps.
        encoder: that the estimates train; None: the stages' defaults.

    Raises:
        UsageError: the generator can't be built, or no stage can use it.
    """
    config = generators.resolve_level(config, device)
    G = generators.load(config, device)
    checked = generators.check(G, config, device)
    with torch.no_grad():
        labels = draw_labels(G, SAMPLES, device, "doctor labels")
        images = G(G.sample(0, SAMPLES).to(device), labels)
        pictures.write_grid(grid, images, COLUMNS)
    print(f"samples: {grid}", flush=True)
    found: dict[str, object] = {
        "device": str(device),
        "record": G.record,
        "check": asdict(checked),
        "samples": str(grid),
    }
    if quick:
        return found
    name = f"{label(config.name)}, {config.level}"
    works = [pairs_work(G, name, device)]
    if G.differentiable:
        estimator = encoder or NavigatorConfig().estimator
        works.insert(0, estimates.navigator_work_of(G, estimator, f"{name}; {estimator.name}", device))
    if images.shape[-1] > LARGEST:  # as --pairs.size would
        images = F.interpolate(images.float(), (LARGEST, LARGEST), mode="bilinear", antialias=True)
    works.append(pretrain_work(images.shape[-1], device, encoder))
    print("by the stages' defaults: estimates from a few steps", flush=True)
    done = []
    for work in works:
        done.append(estimates.estimate(work, device, seconds))
        print(done[-1], flush=True)
    *_, drawn, step = done
    rates = online.measured(images, drawn.seconds, step.seconds, machine.cores())
    either = online.default_run(rates)
    print(either, flush=True)
    either_way = asdict(rates) | asdict(either) | {"shards": either.shards, "online": either.online}
    return found | {"estimates": list(map(asdict, done)), "online": either_way}


def pretrain_work(side: int, device: torch.device, encoder: EncoderConfig | None = None) -> Work:
    """The pretraining stage's default run, on pairs of `side` pixels, with a stem that goes with them."""
    options = PretrainConfig()
    encoder = encoder or replace(options.encoder, stem="imagenet" if side > SMALL else options.encoder.stem)
    work = estimates.pretrain_work_of(encoder, f"{encoder.name}/{encoder.stem}, {side} px", side, device)
    return replace(work, samples=PairsConfig.count * options.epochs)


def pairs_work(G: nn.Module, what: str, device: torch.device) -> Work:
    """The images of a batch of pairs, quantised; encoding goes on beside it."""

    def step(batch: int) -> Step:
        z = G.sample(0, batch).to(device)
        labels = draw_labels(G, batch, device, "doctor labels")

        @torch.no_grad()
        def draw() -> None:
            for _ in range(2):
                to_uint8(G(z, labels))

        return draw

    return Work("pairs", f"{what}, without encoding", PairsConfig.count, PairsConfig.batch, step)
