"""Area pretrain: the stage's whole step beside the reference code's form of it, from the same weights."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import record_function

from bench.areas import _steps, loader
from bench.baselines import pretrain as baselines
from bench.harness import Call
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast import augmentations
from copgen_fast.config import EncoderConfig, PretrainConfig, RunConfig
from copgen_fast.pairs.read.loader import NO_LABEL, Batches, PairBatch, open_batches
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import devices, machine
from copgen_fast.stages.pretrain import make_batch, make_learner, make_step

Fetch = Callable[[int], PairBatch]

_SMALL = PretrainConfig(encoder=PRESETS["cifar10"].pretrain.encoder, augmentation="none")


@dataclass(frozen=True)
class Case:
    """A step on `batch` pairs of random images with `side` pixels a side, by `options`.

    Attributes:
        precisions: those of a GPU; a CPU has float32, and bf16 if supported.
        workers: processes of the peer's augmentation, threads of our loader; None is one for each CPU core.
        compiled: ours with `--compile`.
    """

    batch: int
    side: int
    options: PretrainConfig
    precisions: tuple[str, ...] = ("fp16", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    workers: int | None = None
    compiled: bool = False

    def __str__(self) -> str:
        encoder = self.options.encoder
        width = "" if encoder.width == 64 else f"/{encoder.width}"
        if self.compiled:  # whose minute no choice of the other's name brings in
            return f"torch.compile of {encoder.name}{width}, B={self.batch} {self.side}px"
        return f"{encoder.name}{width} B={self.batch} {self.side}px"

    @property
    def processes(self) -> int:
        return machine.cores() if self.workers is None else self.workers

    def config(self, precision: str) -> RunConfig:
        return RunConfig(precision=precision, compile=self.compiled, pretrain=replace(self.options, batch=self.batch))

    def pairs(self) -> PairBatch:
        seeded = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, self.batch, 3, self.side, self.side), generator=seeded, dtype=torch.uint8)
        return PairBatch(*images, torch.full((self.batch,), NO_LABEL))


CASES = (
    Case(128, 32, _SMALL),
    Case(32, 128, PretrainConfig(encoder=EncoderConfig("resnet18", "imagenet")), devices=("cpu",)),
    Case(224, 128, PretrainConfig(encoder=EncoderConfig("resnet50", "imagenet")), devices=("cuda",)),
)
# Compiling takes a minute: after all else.
COMPILED = (replace(CASES[2], compiled=True, precisions=("fp16",)),)


@dataclass(frozen=True)
class Reading:
    """`steps` steps of a case a call, with pairs read from shards, so that prefetching between calls counts little.

    Attributes:
        epoch: batches in the shards (PNG), read again each epoch and not cached.
    """

    of: Case
    steps: int = 20
    epoch: int = 5

    @property
    def devices(self) -> tuple[str, ...]:
        return self.of.devices

    def __str__(self) -> str:
        return f"{self.of}, {self.steps} steps, pairs read"


READING = (Reading(CASES[0], steps=5), Reading(CASES[2]))


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, one for each precision and peer; then of reading the pairs."""
    yield from _steps.rows(_AREA, CASES, options)
    for case, device in chosen(READING, options):
        with tempfile.TemporaryDirectory() as folder:
            yield from _reading_rows(case, Path(folder), device, options)
    yield from _steps.rows(_AREA, COMPILED, options)


def profiles(options: Options) -> Iterator[str]:
    """Lines of every case's time by phase."""
    yield from _steps.profiles(_AREA, CASES, options)
    for case, device in chosen(READING, options):
        with tempfile.TemporaryDirectory() as folder:
            step, batches, precision = reading_step(case, Path(folder), device)
            steps = map(step, itertools.count(), itertools.repeat(batches))
            yield from _steps.profile(
                f"pretrain {case.of}, pairs read {precision}", partial(next, steps), device, options
            )


def our_steps(case: Case, device: torch.device) -> Iterator[_steps.Step]:
    """The stage's step in each precision: from uint8 pairs on the host, drawing its augmentation.

    On a GPU, where it is not compiled, also as one CUDA graph.
    """
    pairs = case.pairs()
    for precision in _steps.precisions(device, case.precisions):
        step = our_step(case.config(precision), device)
        yield _steps.Step(precision, partial(step, 0, lambda _: pairs))
        if device.type == "cuda" and not case.compiled:
            step = our_step(case.config(precision), device, graph=True)
            yield _steps.Step(precision, partial(step, 0, lambda _: pairs), "CUDA graph")


def our_step(config: RunConfig, device: torch.device, graph: bool = False) -> Callable[[int, Fetch], object]:
    """The stage's step by its index and where its pairs come from."""
    update = make_step(make_learner(config, device), graph, device)

    def step(index: int, fetch: Fetch) -> object:
        with record_function("data"):
            batch = make_batch(config, index, fetch(index), config.pretrain.lr, device)
        return update(batch)

    return step


def their_steps(case: Case, device: torch.device) -> dict[str, Call]:
    """The reference code's form by its name: with its augmentation, and with views made beforehand."""
    config = replace(case.config("fp32"), compile=False)
    policy = augmentations.get(config.pretrain.augmentation)
    augmented = baselines.pictures_loader(case.pairs().images, policy, case.processes)
    views = augmented()

    def step(source: Callable[[], torch.Tensor]) -> Call:
        method = make_learner(config, device).method
        model = nn.Sequential(method.encoder, method.head)
        return baselines.ReferencePretraining(model, source, config.pretrain, method.config).step

    return {
        f"reference form, fp32, PIL views by {case.processes} processes": step(augmented),
        "reference form, fp32, views at hand": step(lambda: views),
    }


def _reading_rows(case: Reading, folder: Path, device: torch.device, options: Options) -> Iterator[Row]:
    """A row beside the same steps on one batch in memory: 1 - ratio is the share of the time that it waits."""
    step, batches, precision = reading_step(case, folder, device)
    in_memory, position = batches(0), itertools.count(1)

    def ours() -> None:
        for index in itertools.islice(position, case.steps):
            step(index, batches)

    def theirs() -> None:
        for index in range(case.steps):
            step(index, lambda _: in_memory)

    bound = _steps.products(_AREA.work, case.of.batch * case.steps, theirs, precision, device)
    backend = "dali" if "dali" in type(batches).__module__ else "plain"
    mine = Candidate("pretrain", str(case), backend, precision, "step", ours, bound)
    yield from compare([mine], {"same steps, batch at hand": theirs}, options, device)


def reading_step(
    case: Reading, folder: Path, device: torch.device
) -> tuple[Callable[[int, Fetch], object], Batches, str]:
    """`our_step`, the stage's loader of shards written to the folder, and the precision."""
    of, precision = case.of, devices.resolve_precision("auto", device)
    config = of.config(precision)
    config = replace(config, pretrain=replace(config.pretrain, cache_gib=0.0, workers=of.processes))
    pairs = loader.write(loader.Case("png", side=of.side, count=case.epoch * of.batch, batch=of.batch), folder)
    return our_step(config, device), open_batches(pairs, config.pretrain, config.seed, device), precision


_AREA = _steps.Area("pretrain", "encoder, two views", our_steps, their_steps)
