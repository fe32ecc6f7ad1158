"""The paper's two training steps on GPUs, by arithmetic: no card has confirmed it.

Every operator takes the longest of its bytes at a card's bandwidth, its products at a card's rate, for the augmentation
its instructions at the rate at which a card starts them, all at EFFICIENCY of the published peaks, and a launch. Counts
are those of `bench.counting`: of the stages' own steps at the paper's sizes, on tensors without memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bench.areas._profile import OTHER, PHASES
from bench.counting import Counter, Work, as_on_gpu
from bench.limits import instructions_per_pixel
from copgen_fast.config import RunConfig
from copgen_fast.generators._rewrites import FEW_LAUNCHES
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.options import Count
from copgen_fast.pairs.read.loader import NO_LABEL, PairBatch
from copgen_fast.positives.navigator import untrained
from copgen_fast.presets import PRESETS
from copgen_fast.stages import Run, navigator, pretrain

RESULTS = Path(__file__).parent / "results" / "roofline.json"
CPU = torch.device("cpu")
Step = Callable[[], object]


@dataclass(frozen=True)
class Card:
    """Published peaks a second: operations of dense half products with sums in float32, of float32, and bytes.

    `issue`: instructions of threads, 128 a cycle of each multiprocessor. `counted`: for which they were counted.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    issue: float
    counted: str = "sm_90"


CARDS = (
    # NVIDIA Turing GPU Architecture (WP-09183-001_v01), appendix A, GeForce RTX 2080 Ti at reference clocks.
    Card("RTX 2080 Ti", 53.8e12, 13.4e12, 616e9, 13.4e12, "sm_75"),
    # NVIDIA Ampere GA102 GPU Architecture (v2.1), table of the GeForce RTX 3090.
    Card("RTX 3090", 71e12, 35.6e12, 936e9, 17.8e12),
    # NVIDIA Ada GPU Architecture (v2.02), appendix A, GeForce RTX 4090.
    Card("RTX 4090", 165.2e12, 82.6e12, 1008e9, 41.3e12),
    # NVIDIA A100 Tensor Core GPU data sheet (June 2021), 80 GB SXM.
    Card("A100", 312e12, 19.5e12, 2039e9, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet (2023), SXM5; without sparsity.
    Card("H100", 989.4e12, 66.9e12, 3350e9, 33.5e12),
)
EFFICIENCY = {"half": 0.5, "single": 0.7, "bandwidth": 0.8, "issue": 0.7}
"""Shares of the peaks that large convolutions, copies and arithmetic usually reach: assumed, not measured."""
LAUNCH = 3e-6
"""Seconds of the shortest kernel; where the host keeps up, as in a CUDA graph."""


@dataclass(frozen=True)
class Options:
    """Print what the paper's two steps take on GPUs by arithmetic."""

    json: Path | None = None
    """File for the counts, as bench/results/roofline.json."""

    navigator_batch: Count = 176
    """Latents of a navigator step; the paper's by default."""

    pretrain_batch: Count = 224
    """Pairs of a pretraining step; the paper's by default."""


@dataclass(frozen=True)
class Part:
    """A part of a step, forward or backward: its launches, and what they move, compute and, where counted, execute."""

    part: str
    backward: bool
    launches: int
    moved: int
    half_flops: int
    single_flops: int
    instructions: dict[str, float]
    ms: dict[str, float]


def navigator_step(config: RunConfig) -> Step:
    """The stage's step through BigBiGAN in half precision, on fake tensors."""
    mode = FakeTensorMode()
    with torch.no_grad(), _networks(mode):
        G = BigBiGAN().eval().requires_grad_(False).rewritten(FEW_LAUNCHES).eval().in_precision(torch.float16)
        G.half_dtype = torch.float16
    batch = _faked(navigator.draw_batch(config, G, 0, CPU), mode)
    with _networks(mode):
        T_z = untrained(G.latent_dim, config.navigator, config.seed, G.latent_groups, (G.latent_dim,))
        players = navigator.make_players(Run(config, Path(), CPU), G, T_z)
    update = navigator.make_step(Run(config, Path(), CPU), players)
    return _within(mode, lambda: update(batch))


def pretrain_step(config: RunConfig) -> Step:
    """The stage's step on uint8 pairs, on fake tensors."""
    mode, side = FakeTensorMode(), config.data.image_size
    images = torch.zeros((2, 1, 3, side, side), dtype=torch.uint8).expand(2, config.pretrain.batch, 3, side, side)
    pairs = PairBatch(*images, torch.full((config.pretrain.batch,), NO_LABEL))
    batch = _faked(pretrain.make_batch(config, 0, pairs, config.pretrain.lr, CPU), mode)
    with _networks(mode):
        learner = pretrain.make_learner(config, CPU)
    return _within(mode, lambda: pretrain.pretrain_step(learner, batch))


@contextlib.contextmanager
def _networks(mode: FakeTensorMode) -> Iterator[None]:
    """Networks made within have fake tensors, which Module.to can't replace in place."""

    def to(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        _, dtype, _, layout = torch._C._nn._parse_to(*arguments, **options)
        for owner in module.modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, x in tensors.items():
                    if x is not None:
                        y = x.detach().to(dtype=dtype if x.is_floating_point() else None)
                        y = y.to(memory_format=layout) if layout is not None and y.ndim == 4 else y
                        tensors[name] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
        return module

    with mock.patch.object(nn.Module, "to", to), mode:
        yield


def _within(mode: FakeTensorMode, step: Step) -> Step:
    def run() -> None:
        with mode:
            step()

    return run


def _faked(batch: object, mode: FakeTensorMode) -> object:
    """A dataclass of tensors, nested, as fake ones."""
    if isinstance(batch, torch.Tensor):
        return mode.from_tensor(batch)
    if not hasattr(batch, "__dataclass_fields__"):
        return tree_map_only(torch.Tensor, mode.from_tensor, batch)
    return replace(batch, **{name: _faked(getattr(batch, name), mode) for name in batch.__dataclass_fields__})


def count(step: Step) -> list[Work]:
    """The work of a warm step."""
    with as_on_gpu():
        step()  # makes the optimisers' states
        with Counter() as counted:
            step()
    return counted.works


def seconds(work: Work, card: Card) -> float:
    """Of one operator on a card: the longest of its bytes, its products, its instructions and its launches."""
    rate = card.half * EFFICIENCY["half"] if work.half else card.single * EFFICIENCY["single"]
    moving = work.moved / card.bandwidth / EFFICIENCY["bandwidth"]
    issuing = instructions(work, card.counted) / card.issue / EFFICIENCY["issue"]
    return max(moving, work.flops / rate, issuing, LAUNCH * work.launches)


def instructions(work: Work, architecture: str) -> float:
    """Of the threads of an augmentation's kernel, for views with all colour ops; 0 of others, which aren't counted."""
    return work.pixels * instructions_per_pixel(architecture)[work.name] if work.pixels else 0.0


def parts(works: Sequence[Work]) -> list[Part]:
    """Sums over each part of a step, in the order of a step."""
    found = []
    for name in (*PHASES, OTHER):
        for backward in (False, True):
            some = [work for work in works if (work.part, work.backward) == (name, backward)]
            if some:
                flops = [sum(work.flops for work in some if work.half == half) for half in (True, False)]
                ms = {card.name: 1e3 * sum(seconds(work, card) for work in some) for card in CARDS}
                sums = sum(work.launches for work in some), sum(work.moved for work in some)
                executed = {x: sum(instructions(work, x) for work in some) for x in ("sm_75", "sm_90")}
                found.append(Part(name, backward, *sums, *flops, executed, ms))
    return found


def measure(navigator_batch: int = 176, pretrain_batch: int = 224) -> dict:
    """Parts of both steps, and the paper's runs in hours on one card each."""
    config = replace(PRESETS["imagenet1k"], precision="fp16")
    config = replace(config, navigator=replace(config.navigator, batch=navigator_batch))
    config = replace(config, pretrain=replace(config.pretrain, batch=pretrain_batch))
    pairs = config.pairs.count * config.pretrain.epochs
    runs, found = {}, []
    for name, step, batch, samples in (
        ("navigator", navigator_step(config), navigator_batch, config.navigator.samples),
        ("pretrain", pretrain_step(config), pretrain_batch, pairs),
    ):
        rows = parts(count(step))
        hours = {card.name: sum(row.ms[card.name] for row in rows) / 3.6e6 * samples / batch for card in CARDS}
        runs[name] = {"batch": batch, "samples": samples, "hours": hours}
        found += [{"step": name, **asdict(row)} for row in rows]
    assumed = {"efficiency": EFFICIENCY, "launch_us": LAUNCH * 1e6, "cards": [asdict(card) for card in CARDS]}
    return assumed | {"runs": runs, "rows": found}


def table(result: dict, step: str) -> list[tuple[str, ...]]:
    """Cells of a step's parts, its sum and the whole run."""
    names, run = [card.name for card in CARDS], result["runs"][step]
    parts = [row for row in result["rows"] if row["step"] == step]
    counts = ("launches", "GB moved", "GFLOP half", "GFLOP fp32", "G instructions (sm_75)")
    lines = [("part", *counts, *(f"{name}, ms" for name in names))]
    total = {"part": "step", "backward": False}
    sums = ("launches", "moved", "half_flops", "single_flops")
    total |= {name: sum(part[name] for part in parts) for name in sums}
    for each in ("ms", "instructions"):
        total[each] = {name: sum(part[each][name] for part in parts) for name in parts[0][each]}
    for part in (*parts, total):
        flops = (f"{part[name] / 1e9:,.0f}" for name in ("half_flops", "single_flops"))
        numbers = (
            f"{part['launches']:,}",
            f"{part['moved'] / 1e9:.2f}",
            *flops,
            f"{part['instructions']['sm_75'] / 1e9:.1f}",
        )
        direction = ", backward" if part["backward"] else ""
        lines.append((part["part"] + direction, *numbers, *(f"{part['ms'][name]:.1f}" for name in names)))
    whole = f"run of {run['samples']:,}, hours"
    return [*lines, (whole, *[""] * len(counts), *(f"{run['hours'][name]:.2f}" for name in names))]
