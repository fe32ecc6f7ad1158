"""Rows of what is ours beside its peers, all from one interleaved run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench import machine
from bench.harness import Call, Row, interleaved, peak_memory
from bench.limits import Limit
from bench.options import Options


@dataclass(frozen=True)
class Subject:
    """What the rows are about: their columns of the same names."""

    area: str
    backend: str
    precision: str
    direction: str


def compare(
    subject: Subject,
    ours: dict[str, Call],
    peers: dict[str, Call],
    bound: Limit,
    options: Options,
    device: torch.device,
) -> Iterator[Row]:
    """Rows of each of ours (named by its case) with each peer (by its name)."""
    times = interleaved({**ours, **peers, "limit": bound.call}, options.repeats, options.min_seconds, device)
    peaks = {name: peak_memory(call, device) for name, call in (ours | peers).items()}
    limit, limit_ms = bound.read(times["limit"])
    for case in ours:
        for peer in peers:
            mine, theirs = times[case], times[peer]
            yield Row(
                area=subject.area,
                case=case,
                device=machine.device_name(device),
                backend=subject.backend,
                precision=subject.precision,
                direction=subject.direction,
                ours_ms=mine.ms,
                ours_spread=mine.spread,
                peer=peer,
                peer_ms=theirs.ms,
                ratio=theirs.ms / mine.ms,
                limit=limit,
                limit_ms=limit_ms,
                of_limit=limit_ms / mine.ms,
                peak_mb=peaks[case],
                peer_peak_mb=peaks[peer],
                n=min(mine.n, theirs.n),
            )
