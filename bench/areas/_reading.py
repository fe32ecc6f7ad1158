"""Time that pretraining waits for data: steps with pairs read from shards beside steps on one batch in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import record_function

from bench.areas import _profile, _steps, loader
from bench.rows import Candidate, Options, Row, compare
from copgen_fast.config import RunConfig
from copgen_fast.pairs.read.loader import Batches, PairBatch, PairDataset, open_batches
from copgen_fast.runtime import devices, machine
from copgen_fast.stages.pretrain import make_batch, make_learner, pretrain_step

Fetch = Callable[[int], PairBatch]


class Case(_steps.Case, Protocol):
    """A pretraining step: its configuration by precision, the images' side and the loader's threads."""

    side: int
    workers: int | None

    def config(self, precision: str) -> RunConfig: ...


@dataclass(frozen=True)
class Reading:
    """`steps` pretraining steps a call, so that batches read ahead between calls count little.

    Attributes:
        epoch: batches in the shards (PNG), read again each epoch and not cached.
    """

    of: Case
    steps: int = 20
    epoch: int = 5

    @property
    def devices(self) -> tuple[str, ...]:
        return self.of.devices

    @property
    def batch(self) -> int:
        return self.of.batch

    def __str__(self) -> str:
        return f"{self.of}, {self.steps} steps, pairs read"


def rows(case: Reading, device: torch.device, options: Options) -> Iterator[Row]:
    """A row with the same steps on one batch at hand as the peer: 1 - ratio is the share of the time it waits."""
    with tempfile.TemporaryDirectory() as folder:
        step, batches, precision = _prepare(case, Path(folder), device)
        at_hand, position = batches(0), itertools.count(1)

        def ours() -> None:
            for index in itertools.islice(position, case.steps):
                step(index, batches)

        def theirs() -> None:
            for index in range(case.steps):
                step(index, lambda _: at_hand)

        bound = _steps.products("encoder, two views", case.batch * case.steps, theirs, precision, device)
        backend = "dali" if "dali" in type(batches).__module__ else "plain"
        mine = Candidate("pretrain", str(case), backend, precision, "step", ours, bound)
        yield from compare([mine], {"same steps, batch at hand": theirs}, options, device, _steps.LEAST)


def profiles(case: Reading, device: torch.device, folder: Path) -> Iterator[str]:
    """Lines of the time by phase of one step with pairs read from shards."""
    with tempfile.TemporaryDirectory() as shards:
        step, batches, precision = _prepare(case, Path(shards), device)
        position = itertools.count()

        def call() -> None:
            step(next(position), batches)

        name = f"pretrain {case.of}, pairs read {precision}"
        yield from _profile.lines(name, _profile.profile(name, call, device, folder))


def _prepare(case: Reading, folder: Path, device: torch.device) -> tuple[Callable[[int, Fetch], None], Batches, str]:
    """A step by its number on what it fetches, the stage's loader on shards just written, and the precision."""
    precision = devices.resolve_precision("auto", device)
    config = case.of.config(precision)
    workers = machine.cores() if case.of.workers is None else case.of.workers
    config = replace(config, pretrain=replace(config.pretrain, cache_gib=0.0, workers=workers))
    pairs: PairDataset = loader.write(
        loader.Case("png", side=case.of.side, count=case.epoch * case.batch, batch=case.batch), folder
    )
    batches = open_batches(pairs, config.pretrain, config.seed, device)
    learner = make_learner(config, device)

    def step(index: int, fetch: Fetch) -> None:
        with record_function("data"):
            batch = make_batch(config, index, fetch(index), config.pretrain.lr, device)
        pretrain_step(learner, batch)

    return step, batches, precision
