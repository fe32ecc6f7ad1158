"""Rows and profiles of whole training steps, shared by the areas navigator and pretrain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.areas import _profile
from bench.harness import Call
from bench.limits import Limit, count_products, matrix_products
from bench.rows import DTYPES, Candidate, Options, Row, chosen, compare
from copgen_fast.config import RunConfig
from copgen_fast.runtime import devices
from copgen_fast.stages import Run


class Case(Protocol):
    """One size of a step; its text names it."""

    batch: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """The stage's step in a precision; `backend` is pytorch or CUDA graph."""

    precision: str
    call: Call
    backend: str = "pytorch"


@dataclass(frozen=True)
class Area:
    """How an area makes its steps.

    Attributes:
        name: the column `area`; `work` says what its products are.
        ours: the stage's steps of a case on a device, in each precision by PyTorch first; `theirs` the peers' by name.
    """

    name: str
    work: str
    ours: Callable[[Any, torch.device], Iterator[Step]]
    theirs: Callable[[Any, torch.device], dict[str, Call]]


def rows(area: Area, cases: tuple[Case, ...], options: Options) -> Iterator[Row]:
    """Rows of every case for this device, one for each of our steps and each peer."""
    for case, device in chosen(cases, options):
        bounds: dict[str, Limit] = {}
        ours = []
        for step in area.ours(case, device):
            try:
                if step.precision not in bounds:
                    bounds[step.precision] = products(area.work, case.batch, step.call, step.precision, device)
            except torch.OutOfMemoryError as error:
                print(f"left out: {case}, {step.precision} ({str(error).partition('. ')[0]})", flush=True)
                torch.cuda.empty_cache()
                continue
            columns = (area.name, str(case), step.backend, step.precision, "step")
            kept = step.backend != "pytorch"
            ours.append(Candidate(*columns, step.call, bounds[step.precision], kept))
        yield from compare(ours, area.theirs(case, device), options, device)


def profiles(area: Area, cases: tuple[Case, ...], options: Options) -> Iterator[str]:
    """Lines of each case's time by phase, in each precision."""
    for case, device in chosen(cases, options):
        for step in area.ours(case, device):
            if step.backend == "pytorch":  # a replayed graph has no marks
                yield from profile(f"{area.name} {case} {step.precision}", step.call, device, options)


def profile(name: str, step: Call, device: torch.device, options: Options) -> Iterator[str]:
    """Lines of a step's time by phase; its trace goes to the folder `options.profile`."""
    return _profile.lines(name, _profile.profile(name, step, device, options.profile))


def precisions(device: torch.device, of_gpus: tuple[str, ...]) -> tuple[str, ...]:
    """Precisions to measure: float32 and bf16 on a CPU, `of_gpus` on a GPU; bf16 only with instructions for it."""
    wanted = ("fp32", "bf16") if device.type == "cpu" else of_gpus
    if "bf16" in wanted and not devices.multiplies_bf16(device):
        print("left out: bf16 (this device has no instructions for it)", flush=True)
        return tuple(precision for precision in wanted if precision != "bf16")
    return wanted


def products(what: str, batch: int, step: Call, precision: str, device: torch.device) -> Limit:
    """The products of a step, counted as it computes them, at the rate of a large product in its precision."""
    operations = count_products(step)
    return matrix_products(f"{what}: {operations / batch / 1e9:.3g} a sample", operations, DTYPES[precision], device)


def run(config: RunConfig, device: torch.device) -> Run:
    """A run that writes nothing."""
    return Run(config, Path(), device)
