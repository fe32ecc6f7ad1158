"""Timing of calls that compete in one process, and the row that a benchmark reports."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from copgen_fast.errors import CopgenError

Call = Callable[[], object]

LEAST_SAMPLES = 5
# Seconds of samples that one candidate may take before it gets fewer of them than the others.
_PATIENCE = 1.5
# Seconds of a first call behind which what a second would warm up more is nothing.
_WARM_AT_ONCE = 10.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison with one peer; a file of results holds these fields.

    Attributes:
        ours_ms, peer_ms: medians of a call. `ours_spread` is the 80th percentile over the 20th.
        ratio: peer_ms / ours_ms.
        limit: what bounds ours, in words; `limit_ms` is how long that takes, `of_limit` limit_ms / ours_ms.
        peak_mb, peer_peak_mb: peak memory of a call beside its inputs, in 10^6 bytes; None where it can't be told.
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
    limit: str
    limit_ms: float
    of_limit: float
    peak_mb: float | None
    peer_peak_mb: float | None
    n: int


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a call, 80th over 20th percentile, and how many samples they are of."""

    ms: float
    spread: float
    n: int


def interleaved(
    candidates: dict[str, Call],
    repeats: int,
    min_seconds: float,
    device: torch.device | str = "cpu",
    least: int = LEAST_SAMPLES,
) -> dict[str, Timing]:
    """Time all candidates in alternating rounds, so that a change of the machine's pace meets all of them.

    Each is called twice beforehand, or once where that takes more than 10 seconds; one that a GPU has no memory for,
    or that refuses, is left out, with a line that says so. A sample is the mean of as many calls as fill
    `min_seconds`; there are `repeats` rounds of a sample each, every other round in reverse order. A slow candidate
    sits rounds out, evenly, but gives at least `least` samples. On a GPU a sample is the time between two events
    around its calls.
    """
    rounds = max(repeats, least)
    seconds: dict[str, float] = {}
    for name, call in candidates.items():
        try:
            seconds[name] = _sample(call, 1, device)
            if seconds[name] <= _WARM_AT_ONCE:
                seconds[name] = _sample(call, 1, device)
        except (torch.OutOfMemoryError, CopgenError) as error:
            print(f"left out: {name} ({str(error).partition('. ')[0]})", flush=True)
            torch.cuda.empty_cache()
    candidates = {name: candidates[name] for name in seconds}
    calls = {name: max(1, round(min_seconds / max(took, 1e-9))) for name, took in seconds.items()}
    affordable = {name: int(_PATIENCE / max(took * calls[name], 1e-9)) for name, took in seconds.items()}
    wanted = {name: min(rounds, max(least, many)) for name, many in affordable.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    with _no_garbage_collection():
        for turn in range(rounds):
            for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
                if (turn + 1) * wanted[name] // rounds > turn * wanted[name] // rounds:
                    samples[name].append(_sample(candidates[name], calls[name], device))
    return {name: _timing(found) for name, found in samples.items()}


def _sample(call: Call, times: int, device: torch.device | str) -> float:
    """Mean seconds of `times` calls."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _timing(seconds: list[float]) -> Timing:
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds) * 1e3, fifths[3] / max(fifths[0], 1e-12), len(seconds))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
