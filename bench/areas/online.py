"""Area online: pretraining steps on pairs generated while training, beside the same steps on pairs read from shards."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.areas import _steps
from bench.areas.pretrain import Fetch, our_step
from bench.harness import Call
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast import generators
from copgen_fast.config import EncoderConfig, PairsConfig, PretrainConfig, RunConfig
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.generators.cifar10_dcgan import Cifar10DCGAN
from copgen_fast.pairs.online import OnlinePairs
from copgen_fast.pairs.read.loader import PairDataset, open_batches
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.pairs.write.writer import write_pairs
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import devices, machine, seeds
from copgen_fast.runtime.latents import NamedPrior, sample_each

_PNG, _AT_HAND = "same steps, PNG shards", "same steps, batch at hand"
_WRITE = "no steps, their pairs written as PNG shards"
_GENERATE = "generation of their pairs alone"


def digits() -> nn.Module:
    """The embedded generator of digits, 32 px."""
    return generators.build("digits")


def bigbigan() -> nn.Module:
    """BigBiGAN's layers at a sixth of their width, 32 px, with random weights."""
    with seeds.seeded("bench generator"):
        return BigBiGAN(16, 32).eval().requires_grad_(False)


def cifar10_dcgan() -> nn.Module:
    """A DCGAN for CIFAR-10, 32 px, with random weights and batch norm's statistics measured on one batch."""
    with seeds.seeded("bench generator"), torch.no_grad():
        G = Cifar10DCGAN().requires_grad_(False)
        for module in G.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # of this one batch, as images would be grey otherwise
        G(torch.randn(256, G.latent_dim))
    return G.eval()


@dataclass(frozen=True)
class Case:
    """`steps` steps a call on `batch` pairs of a generator's images, with Gaussian positives.

    Attributes:
        epoch: batches in the shards, which are read again each epoch and not cached.
    """

    make: Callable[[], nn.Module]
    batch: int = 128
    steps: int = 2
    epoch: int = 4
    encoder: EncoderConfig = PRESETS["cifar10"].pretrain.encoder
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{self.make.__name__}, {self.encoder.name}/{self.encoder.width} B={self.batch}, {self.steps} steps"


_FULL = EncoderConfig("resnet18", "half")
_MAKES = (digits, cifar10_dcgan, bigbigan)
# On a GPU steps of the narrow encoder are launches and little else.
CASES = (*map(Case, _MAKES), *(Case(make, 256, encoder=_FULL, devices=("cuda",)) for make in _MAKES))


def rows(options: Options) -> Iterator[Row]:
    """Benchmark rows of every case: training steps on generated pairs, beside steps on shards and their writing."""
    for case, device in chosen(CASES, options):
        with tempfile.TemporaryDirectory() as folder:
            found = {row.peer: row for row in _rows(case, Path(folder), device, options)}
        yield from found.values()
        if _PNG in found and _WRITE in found:
            print(crossing(found[_PNG].ours_ms, found[_PNG].peer_ms, found[_WRITE].peer_ms), flush=True)


def crossing(online: float, shards: float, write: float) -> str:
    """The number of epochs from which shards cost less time than online pairs, as text; writing them takes `write`."""
    if online <= shards:
        return "online pairs cost less than PNG shards, whatever the number of epochs"
    return f"online pairs cost less than PNG shards up to {write / (online - shards):.1f} epochs"


def _rows(case: Case, folder: Path, device: torch.device, options: Options) -> Iterator[Row]:
    precision = devices.resolve_precision("auto", device)
    pretrain = PretrainConfig(
        encoder=case.encoder, batch=case.batch, augmentation="digits", cache_gib=0.0, workers=machine.cores()
    )
    config = RunConfig(precision=precision, pretrain=pretrain)
    of = source(case, device)
    sets = {"online": OnlinePairs(of, case.epoch * case.batch)}
    for codec in ("png", "raw"):
        pairs = PairsConfig(count=case.epoch * case.batch, codec=codec, workers=0)
        write_pairs(folder / codec, of, pairs, {})
        sets[codec] = PairDataset(folder / codec)
    batches = {name: open_batches(pairs, config.pretrain, config.seed, device) for name, pairs in sets.items()}
    at_hand = batches["online"](0)
    calls = {name: _call(case, config, device, fetch) for name, fetch in batches.items()}
    peers = {
        _PNG: calls["png"],
        "same steps, raw shards": calls["raw"],
        _AT_HAND: _call(case, config, device, lambda _: at_hand),
        _WRITE: _write(case, of, folder),
        _GENERATE: _generate(case, sets["online"]),
    }
    bound = _steps.products("encoder, two views", case.batch * case.steps, peers[_AT_HAND], precision, device)
    mine = Candidate("online", str(case), "pytorch", precision, "step", calls["online"], bound)
    yield from compare([mine], peers, options, device)


def _write(case: Case, of: PairSource, folder: Path) -> Call:
    """A function that generates the pairs of `case.steps` steps and writes them as PNG shards."""
    pairs = PairsConfig(count=case.steps * case.batch, codec="png", workers=machine.cores())
    numbers = itertools.count()
    return lambda: write_pairs(folder / f"written{next(numbers)}", of, pairs, {})


def _generate(case: Case, pairs: OnlinePairs) -> Call:
    """A function that generates the pairs of `case.steps` steps."""

    def call() -> None:
        for step in range(case.steps):
            pairs.draw(range(step * case.batch, (step + 1) * case.batch))

    return call


def source(case: Case, device: torch.device) -> PairSource:
    """What makes a case's pairs: the generator's exact form, and noise of 0.2 on its latents."""
    G = generators.optimize(case.make().to(device), "exact")

    def positive(z: torch.Tensor, of: list[int]) -> torch.Tensor:
        return z + 0.2 * sample_each("truncnorm", [(seed, 1) for seed in of], G.latent_dim)

    return PairSource(G, positive, G.latent_dim, NamedPrior(getattr(G, "prior", "truncnorm"), G.latent_dim), device)


def _call(case: Case, config: RunConfig, device: torch.device, fetch: Fetch) -> Call:
    """A function that runs `case.steps` training steps of a new encoder."""
    step, position = our_step(config, device), itertools.count()

    def call() -> None:
        for index in itertools.islice(position, case.steps):
            step(index, fetch)

    return call
