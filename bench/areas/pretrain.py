"""Area pretrain: the stage's whole step beside the reference code's form of it, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.profiler import record_function

from bench.areas import _reading, _steps
from bench.baselines import pretrain as baselines
from bench.harness import Call
from bench.rows import Options, Row, chosen
from copgen_fast import augmentations
from copgen_fast.config import PRESETS, EncoderConfig, PretrainConfig, RunConfig
from copgen_fast.pairs.read.loader import NO_LABEL, PairBatch
from copgen_fast.runtime import machine
from copgen_fast.stages.pretrain import make_batch, make_learner, pretrain_step

_SMALL = PRESETS["quickstart"].pretrain


@dataclass(frozen=True)
class Case:
    """A step on `batch` pairs of random images with `side` pixels a side, by `options`.

    Attributes:
        precisions: those of a GPU; a CPU has float32, and bf16 where it can.
        workers: processes in which the peer augments; None is one for each CPU core.
    """

    batch: int
    side: int
    options: PretrainConfig
    precisions: tuple[str, ...] = ("fp16", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    workers: int | None = None

    def __str__(self) -> str:
        encoder = self.options.encoder
        width = "" if encoder.width == 64 else f"/{encoder.width}"
        return f"{encoder.name}{width} B={self.batch} {self.side}px"

    def config(self, precision: str) -> RunConfig:
        return RunConfig(precision=precision, pretrain=replace(self.options, batch=self.batch))

    def pairs(self) -> PairBatch:
        seeded = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, self.batch, 3, self.side, self.side), generator=seeded, dtype=torch.uint8)
        return PairBatch(*images, torch.full((self.batch,), NO_LABEL))


CASES = (
    Case(128, 32, _SMALL),
    Case(32, 128, PretrainConfig(encoder=EncoderConfig("resnet18", "imagenet")), devices=("cpu",)),
    Case(224, 128, PretrainConfig(encoder=EncoderConfig("resnet50", "imagenet")), devices=("cuda",)),
)

READING = (_reading.Reading(CASES[0], steps=5), _reading.Reading(CASES[2]))


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, one for each precision; then what reading the pairs adds."""
    yield from _steps.rows(_AREA, CASES, options)
    for case, device in chosen(READING, options):
        yield from _reading.rows(case, device, options)


def profiles(options: Options) -> Iterator[str]:
    """Lines of every case's time by phase."""
    yield from _steps.profiles(_AREA, CASES, options)
    for case, device in chosen(READING, options):
        yield from _reading.profiles(case, device, options.profile)


def our_steps(case: Case, device: torch.device) -> Iterator[_steps.Step]:
    """The stage's step in each precision: from uint8 pairs on the host, drawing its augmentation."""
    pairs = case.pairs()
    for precision in _steps.precisions(device, case.precisions):
        yield _steps.Step(precision, _our_step(case, pairs, precision, device))


def _our_step(case: Case, pairs: PairBatch, precision: str, device: torch.device) -> Call:
    config = case.config(precision)
    learner = make_learner(config, device)

    def step() -> object:
        with record_function("data"):
            batch = make_batch(config, 0, pairs, config.pretrain.lr, device)
        return pretrain_step(learner, batch)

    return step


def their_steps(case: Case, device: torch.device) -> dict[str, Call]:
    """The reference form by its name: with its augmentation, and with views that were made beforehand."""
    config = case.config("fp32")
    options, pairs = config.pretrain, case.pairs()
    workers = machine.cores() if case.workers is None else case.workers
    policy = augmentations.get(options.augmentation)
    augmented = baselines.pictures_loader(pairs.anchors, pairs.positives, policy, workers)
    views = augmented()

    def step(source: Callable[[], torch.Tensor]) -> Call:
        method = make_learner(config, device).method
        training = baselines.reference_training(
            nn.Sequential(method.encoder, method.head),
            source,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            temperature=method.config.temperature,
            base_temperature=method.config.base_temperature,
        )
        return lambda: baselines.reference_step(training)

    return {
        f"reference form, fp32, PIL views by {workers} processes": step(augmented),
        "reference form, fp32, views at hand": step(lambda: views),
    }


_AREA = _steps.Area("pretrain", "encoder, two views", our_steps, their_steps)
