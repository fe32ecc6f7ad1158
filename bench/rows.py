"""Rows of a benchmark: our implementation beside its peers, timed in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from bench import machine
from bench.harness import LEAST_SAMPLES, SAMPLING_SECONDS, Call, interleaved, ratio_interval
from bench.limits import Limit
from copgen_fast.options import Count, Range
from copgen_fast.runtime import devices
from copgen_fast.runtime.memory import peak_memory

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Options:
    """How to measure."""

    json: Path | None = None
    """File for the results."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the first GPU where there is one."""

    threads: Count | None = None
    """Threads of PyTorch on the CPU; None keeps PyTorch's default."""

    repeats: Count = 30
    """Samples of each measurement; slow calls get fewer, at least 7."""

    min_seconds: Annotated[float, Range(0, 60)] = 0.005
    """A sample repeats a call until it lasts about this long."""

    seconds: Annotated[float, Range(0, 3600)] = SAMPLING_SECONDS
    """A call is slow, and gets fewer samples, where all of them would take longer than this. More seconds and repeats
    narrow a ratio's interval."""

    only: str = ""
    """Measure only the cases whose text contains this, such as "B=64 128px"."""

    ablate: bool = False
    """augment, generator: also time them with one part left out at a time; without the rest by `--only without`."""

    profile: Path | None = None
    """navigator, pretrain: instead of measuring, write a Chrome trace of each case to this folder and print where its
    time goes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison with one peer; a file of results holds these fields.

    Attributes:
        ours_ms, peer_ms: medians of a call. `ours_spread` is the 80th percentile over the 20th.
        ratio: peer_ms / ours_ms; `ratio_low` and `ratio_high` bound its 95 % interval (bootstrap of both medians).
        limit: what bounds our time, in words; `limit_ms` is how long that takes, `of_limit` limit_ms / ours_ms.
        peak_mb, peer_peak_mb: peak memory of a call beside its inputs, in 10^6 bytes; None where it is unknown.
        n: samples behind the median, the smaller number of ours and the peer's.
    """

    area: str
    case: str
    device: str
    backend: str
    precision: str
    direction: str
    ours_ms: float
    ours_spread: float
    peer: str
    peer_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    limit: str
    limit_ms: float
    of_limit: float
    peak_mb: float | None
    peer_peak_mb: float | None
    n: int


@dataclass(frozen=True)
class Candidate:
    """Our implementation of one case: the row's columns of the same names, the call to time and what bounds it.

    `kept`: its memory is kept between calls, as a CUDA graph's is, so that no call shows it.
    """

    area: str
    case: str
    backend: str
    precision: str
    direction: str
    call: Call
    bound: Limit
    kept: bool = False


def chosen(cases: Iterable[Any], options: Options) -> Iterator[tuple[Any, torch.device]]:
    """The cases that are for the device of `options` (`case.devices`) and that its `only` selects, with the device."""
    device = devices.resolve(options.device, "fp32")
    for case in cases:
        if device.type in case.devices and options.only in str(case):
            yield case, device


def in_both_directions(cases: Iterable[Any], measure: Callable[..., Iterator[Row]], options: Options) -> Iterator[Row]:
    """Rows of `measure(case, direction, device, options)` for every chosen case and direction."""
    for case, device in chosen(cases, options):
        for direction in DIRECTIONS:
            yield from measure(case, direction, device, options)


def in_direction(
    direction: str, run: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor | None = None
) -> Call:
    """The call to time: `run(*inputs)` without gradients, or with those with respect to all inputs."""
    if direction == "forward":
        return torch.no_grad()(lambda: run(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, gradient)


def compare(
    ours: Sequence[Candidate],
    peers: dict[str, Call],
    options: Options,
    device: torch.device,
    least: int = LEAST_SAMPLES,
) -> Iterator[Row]:
    """Rows of each of ours with each peer, all timed in alternation; at least `least` samples each."""
    mine = {f"{own.case}, {own.backend}, {own.precision}": own for own in ours}
    bounds = {f"limit {id(own.bound)}": own.bound.call for own in ours}
    calls = {name: own.call for name, own in mine.items()} | peers
    times = interleaved({**calls, **bounds}, options.repeats, options.min_seconds, device, least, options.seconds)
    peaks = {name: peak_memory(call, device) for name, call in calls.items() if name in times}
    for name, own in mine.items():
        for peer in peers:
            if name in times and peer in times:
                time, peer_time = times[name], times[peer]
                low, high = ratio_interval(time, peer_time)
                limit, limit_ms = own.bound.read(times[f"limit {id(own.bound)}"])
                yield Row(
                    area=own.area,
                    case=own.case,
                    device=machine.device_name(device),
                    backend=own.backend,
                    precision=own.precision,
                    direction=own.direction,
                    ours_ms=time.ms,
                    ours_spread=time.spread,
                    peer=peer,
                    peer_ms=peer_time.ms,
                    ratio=peer_time.ms / time.ms,
                    ratio_low=low,
                    ratio_high=high,
                    limit=limit,
                    limit_ms=limit_ms,
                    of_limit=limit_ms / time.ms,
                    peak_mb=None if own.kept else peaks[name],
                    peer_peak_mb=peaks[peer],
                    n=min(time.n, peer_time.n),
                )
