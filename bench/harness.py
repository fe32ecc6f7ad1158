"""Interleaved timing of competing calls in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from copgen_fast.errors import CopgenError
from copgen_fast.runtime.memory import no_garbage_collection

Call = Callable[[], object]
T = TypeVar("T")

LEAST_SAMPLES = 7
# Seconds of samples that one candidate may take, where nothing else is said; a slower one gets fewer samples.
SAMPLING_SECONDS = 1.5
# A first call longer than this, in seconds, is warm-up enough.
_WARM_AT_ONCE = 10.0


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a call, its 80th over its 20th percentile, the number of samples, and these in seconds."""

    ms: float
    spread: float
    n: int
    seconds: tuple[float, ...] = field(default=(), compare=False, repr=False)


def captured(call: Call) -> Call:
    """A GPU's call as a CUDA graph, whose replay takes the host one launch: what the GPU alone needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what libraries choose and allocate at first
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def ratio_interval(ours: Timing, peer: Timing, draws: int = 1000) -> tuple[float, float]:
    """The 95 % interval of peer over ours: bootstrap of both medians, the same in every call.

    With equally many samples of each, whole rounds are drawn, so that what slows a round down, slows both.
    """
    seeded = random.Random(0)

    def drawn(samples: Sequence[T]) -> list[T]:
        return seeded.choices(samples, k=len(samples))

    def ratio() -> float:
        if ours.n == peer.n:
            mine, theirs = zip(*drawn(list(zip(ours.seconds, peer.seconds, strict=True))), strict=True)
        else:
            mine, theirs = drawn(ours.seconds), drawn(peer.seconds)
        return statistics.median(theirs) / statistics.median(mine)

    ratios = sorted(ratio() for _ in range(draws))
    return ratios[round(0.025 * draws)], ratios[round(0.975 * draws) - 1]


def interleaved(
    candidates: dict[str, Call],
    repeats: int,
    min_seconds: float,
    device: torch.device | str = "cpu",
    least: int = LEAST_SAMPLES,
    sampling_seconds: float = SAMPLING_SECONDS,
) -> dict[str, Timing]:
    """Time all candidates in alternating rounds, so that changes in the machine's speed affect all of them alike.

    Each is first called twice, or once where that takes more than 10 seconds; one that raises CopgenError or for which
    a GPU's memory is too small is left out, with a printed line. A sample is the mean of as many calls as fill
    `min_seconds`; there are `repeats` rounds of one sample each, every other round in reverse order. A candidate
    whose samples would take longer than `sampling_seconds` skips rounds, evenly, but gives at least `least` samples.
    On a GPU a sample is the time between two events around its calls.
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
    affordable = {name: int(sampling_seconds / max(took * calls[name], 1e-9)) for name, took in seconds.items()}
    wanted = {name: min(rounds, max(least, many)) for name, many in affordable.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    with no_garbage_collection():
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
    return Timing(statistics.median(seconds) * 1e3, fifths[3] / max(fifths[0], 1e-12), len(seconds), tuple(seconds))
