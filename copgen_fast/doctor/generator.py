"""What the doctor says of one generator: its check, samples, how long the navigator and the pairs would take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig, NavigatorConfig, PairsConfig
from copgen_fast.doctor import estimates
from copgen_fast.doctor.estimates import Step, Work
from copgen_fast.images import pictures
from copgen_fast.pairs.format import to_uint8
from copgen_fast.registry import label
from copgen_fast.stages._draws import draw_labels

COLUMNS, SAMPLES = 8, 32


def examine(
    config: GeneratorConfig, device: torch.device, grid: Path, quick: bool, seconds: float = estimates.SECONDS
) -> dict[str, object]:
    """Print the report as it is made and write the grid; returns it.

    Raises:
        UsageError: the generator can't be built, or no stage can use it.
    """
    config = generators.resolve_level(config, device)
    G = generators.load(config, device)
    checked = generators.check(G, config, device)
    with torch.no_grad():
        labels = draw_labels(G, SAMPLES, device, "doctor labels")
        pictures.write_grid(grid, G(G.sample(0, SAMPLES).to(device), labels), COLUMNS)
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
        estimator = NavigatorConfig().estimator
        works.insert(0, estimates.navigator_work_of(G, estimator, f"{name}; {estimator.name}", device))
    found["estimates"] = []
    print("by the stages' defaults: estimates from a few steps", flush=True)
    for work in works:
        one = estimates.estimate(work, device, seconds)
        print(one, flush=True)
        found["estimates"].append(asdict(one))
    return found


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
