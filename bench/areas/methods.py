"""Area methods: a step of each self-supervised method beside SimCLR's, and beside lightly's modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.areas import _steps
from bench.areas.pretrain import our_step
from bench.baselines.methods import LightlySteps
from bench.harness import Call
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast import augmentations
from copgen_fast.config import EncoderConfig, MethodConfig, PairsConfig, PretrainConfig, RunConfig
from copgen_fast.encoders import Encoder
from copgen_fast.pairs.read.loader import NO_LABEL, PairBatch
from copgen_fast.runtime import seeds
from copgen_fast.stages.pretrain import make_batch

QUEUE = 4096


@dataclass(frozen=True)
class Case:
    """A step of a method on `batch` pairs of random images with `side` pixels a side.

    Attributes:
        words: options of the method.
        peers: whether lightly has the method.
    """

    method: str
    batch: int
    side: int
    encoder: EncoderConfig
    words: tuple[str, ...] = ()
    peers: bool = True
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{' '.join((self.method, *self.words))} B={self.batch} {self.side}px"

    def config(self, method: MethodConfig) -> RunConfig:
        pretrain = PretrainConfig(encoder=self.encoder, batch=self.batch)
        pairs = PairsConfig(count=4 * QUEUE)
        return RunConfig(precision=self.precision, pretrain=pretrain, method=method, pairs=pairs)

    def pairs(self) -> PairBatch:
        seeded = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, self.batch, 3, self.side, self.side), generator=seeded, dtype=torch.uint8)
        return PairBatch(*images, torch.full((self.batch,), NO_LABEL))


METHODS = (
    ("nnclr", (), True),
    ("moco", (), True),
    ("negft", (), False),
    ("negft", ("negatives=queue",), False),
    ("simsiam", (), True),
    ("byol", (), True),
)
CASES = tuple(
    Case(method, batch, side, EncoderConfig("resnet18", stem), words, peers)
    # 8 px: heads and losses, in which methods differ, weigh most.
    for batch, side, stem in ((64, 32, "half"), (16, 128, "imagenet"), (64, 8, "half"))
    for method, words, peers in METHODS
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case: SimCLR's step is a peer, which says what a method costs; then lightly's."""
    for case, device in chosen(CASES, options):
        ours = step_of(case, MethodConfig(case.method, case.words), device)
        bound = _steps.products("encoder, heads, two views", case.batch, ours, case.precision, device)
        mine = Candidate("methods", str(case), "pytorch", case.precision, "step", ours, bound)
        yield from compare([mine], peers(case, device), options, device)


def step_of(case: Case, method: MethodConfig, device: torch.device) -> Call:
    """The stage's step by a method, from uint8 pairs on the host."""
    pairs = case.pairs()
    return partial(our_step(case.config(method), device), 0, lambda _: pairs)


def peers(case: Case, device: torch.device) -> dict[str, Call]:
    """SimCLR's step here, and the method's of lightly's modules on views made in the same way."""
    found = {"simclr here": step_of(case, MethodConfig(), device)}
    if case.peers:
        config = case.config(MethodConfig())
        pairs, policy = case.pairs(), augmentations.get(config.pretrain.augmentation)

        def views() -> torch.Tensor:
            batch = make_batch(config, 0, pairs, 0.1, device)
            return augmentations.make_views(batch.images, batch.params, policy)

        with seeds.seeded(0):
            encoder = Encoder(case.encoder).to(device, memory_format=torch.channels_last)
            options = replace(config.pretrain, lr=0.03 * case.batch / 256)
            found["lightly's modules, our encoder and views"] = LightlySteps(
                case.method, encoder, views, options, QUEUE
            ).step
    return found
