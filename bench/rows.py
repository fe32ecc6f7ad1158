"""Rows of what is ours beside its peers, all from one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import machine
from bench.harness import LEAST_SAMPLES, Call, Row, Timing, interleaved
from bench.limits import Limit
from bench.options import Options
from copgen_fast.runtime import devices
from copgen_fast.runtime.memory import peak_memory


def in_both_directions(cases: Sequence, measure: Callable[..., Iterator[Row]], options: Options) -> Iterator[Row]:
    """`measure(case, direction, device, options)` of every case for the device that `options` name and allow.

    Args:
        cases: with the device types where each is measured as `devices`.
    """
    device = devices.resolve(options.device, "fp32")
    for case in cases:
        if device.type in case.devices and options.only in str(case):
            for direction in ("forward", "forward+backward"):
                yield from measure(case, direction, device, options)


@dataclass(frozen=True)
class Subject:
    """What the rows are about: their columns of the same names."""

    area: str
    backend: str
    precision: str
    direction: str


@dataclass(frozen=True)
class Ours:
    """One of ours: what its row is about, its case, the call to time and what bounds it.

    `kept`: its memory is kept between calls, as a CUDA graph's, so that no call shows it.
    """

    subject: Subject
    case: str
    call: Call
    bound: Limit
    kept: bool = False


def compare(
    subject: Subject,
    ours: dict[str, Call],
    peers: dict[str, Call],
    bound: Limit,
    options: Options,
    device: torch.device,
) -> Iterator[Row]:
    """Rows of each of ours (named by its case) with each peer (by its name), under one limit."""
    return compare_all([Ours(subject, case, call, bound) for case, call in ours.items()], peers, options, device)


def compare_all(
    ours: list[Ours], peers: dict[str, Call], options: Options, device: torch.device, least: int = LEAST_SAMPLES
) -> Iterator[Row]:
    """Rows of each of ours with each peer, all timed in alternation; `least` samples of the slowest."""
    mine = {f"{own.case}, {own.subject.backend}, {own.subject.precision}": own for own in ours}
    bounds = {f"limit {id(own.bound)}": own.bound.call for own in ours}
    calls = {name: own.call for name, own in mine.items()} | peers
    times = interleaved({**calls, **bounds}, options.repeats, options.min_seconds, device, least)
    peaks = {name: peak_memory(call, device) for name, call in calls.items() if name in times}
    for name, own in mine.items():
        for peer in peers:
            if name in times and peer in times:
                limit = own.bound.read(times[f"limit {id(own.bound)}"])
                peak = None if own.kept else peaks[name]
                yield _row(own, times[name], peak, peer, times[peer], peaks[peer], limit, device)


def _row(
    own: Ours,
    time: Timing,
    peak: float | None,
    peer: str,
    peer_time: Timing,
    peer_peak: float | None,
    limit: tuple[str, float],
    device: torch.device,
) -> Row:
    words, limit_ms = limit
    return Row(
        area=own.subject.area,
        case=own.case,
        device=machine.device_name(device),
        backend=own.subject.backend,
        precision=own.subject.precision,
        direction=own.subject.direction,
        ours_ms=time.ms,
        ours_spread=time.spread,
        peer=peer,
        peer_ms=peer_time.ms,
        ratio=peer_time.ms / time.ms,
        limit=words,
        limit_ms=limit_ms,
        of_limit=limit_ms / time.ms,
        peak_mb=peak,
        peer_peak_mb=peer_peak,
        n=min(time.n, peer_time.n),
    )
