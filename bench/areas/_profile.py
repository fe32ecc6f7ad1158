"""Where the time of a training step goes: a Chrome trace of it, and shares by the steps' own marks.

Forward work belongs to the nearest mark around it (`record_function` in the stages). Backward work belongs to the mark
of the forward operation that it differentiates: autograd numbers its nodes in the order in which forward operations
create them, and the profiler notes that number, and the forward thread, on both; a gradient's accumulation counts to
the node that hands it over. What has neither, as the engine's own work and the monitored numbers, is `other`. On the
CPU time is that of the operations on their threads; on a GPU that of the kernels which they launch, and what is left
of the step the device is idle.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from bench.harness import Call
from copgen_fast.runtime import artifacts

# The stages' marks, in the order in which a step meets them.
PHASES = ("data", "generator", "augment", "estimator", "loss", "optimizer")
OTHER = "other"
_STEP = "bench step"
_STEPS = 3


@dataclass
class Breakdown:
    """Milliseconds a step by phase, of its forward and of its backward operations.

    Attributes:
        step_ms: wall-clock time of a step.
        idle_ms: a GPU's time without a kernel; 0 on the CPU.
        data_wait_ms: the host's time in drawing and fetching a batch.
    """

    step_ms: float
    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    idle_ms: float = 0.0
    data_wait_ms: float = 0.0


def profile(name: str, call: Call, device: torch.device, folder: Path) -> Breakdown:
    """Run a step a few times, warm; leaves FOLDER/NAME.json, which chrome://tracing and Perfetto show."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            with record_function(_STEP):
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)}.json"
    with artifacts.atomic(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    return breakdown(profiler.events(), device)


def breakdown(events: Iterable[FunctionEvent], device: torch.device) -> Breakdown:
    """Attribute the events of `_STEPS` marked steps."""
    on_gpu = device.type == "cuda"
    host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    found = Breakdown(sum(e.cpu_time_total for e in host if e.name == _STEP) / _STEPS / 1e3)
    phases = _Phases(host)
    attributed = 0.0
    for event in host:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent and phases.within_step(event):
            phase, backward = phases.of(event)
            column = found.backward if backward else found.forward
            column[phase] = column.get(phase, 0.0) + spent / _STEPS / 1e3
            attributed += spent / _STEPS / 1e3
        if event.name == "data":
            found.data_wait_ms += event.cpu_time_total / _STEPS / 1e3
    if on_gpu:
        kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        busy = sum(e.time_range.elapsed_us() for e in kernels) / _STEPS / 1e3
        found.forward[OTHER] = found.forward.get(OTHER, 0.0) + max(0.0, busy - attributed)
        found.idle_ms = max(0.0, found.step_ms - busy)
    return found


class _Phases:
    """Which phase an event belongs to, and whether by way of the backward pass."""

    def __init__(self, host: list[FunctionEvent]) -> None:
        self._known: dict[int, tuple[str, bool]] = {}
        self._inside: dict[int, bool] = {}
        # Operations by thread and by the number that the next node gets when they start, the last one of each number:
        # it makes that node, and those up to the next operation's number; those before it made none.
        self._started: dict[int, dict[int, FunctionEvent]] = {}
        for e in host:
            if e.sequence_nr >= 0 and not e.fwd_thread:
                self._started.setdefault(e.thread, {})[e.sequence_nr] = e
        self._numbers = {thread: sorted(started) for thread, started in self._started.items()}
        # A backward thread of a GPU has no step around it; all that it does here is of some step.
        self._main = {e.thread for e in host if e.name == _STEP}

    def of(self, event: FunctionEvent) -> tuple[str, bool]:
        if id(event) not in self._known:
            self._known[id(event)] = self._find(event)
        return self._known[id(event)]

    def within_step(self, event: FunctionEvent) -> bool:
        if id(event) not in self._inside:
            parent = event.cpu_parent
            self._inside[id(event)] = event.name == _STEP or (
                event.thread not in self._main if parent is None else self.within_step(parent)
            )
        return self._inside[id(event)]

    def _find(self, event: FunctionEvent) -> tuple[str, bool]:
        if event.name in PHASES:
            return event.name, False
        if event.fwd_thread and event.sequence_nr >= 0:  # a node of the backward pass
            maker = self._maker(event.fwd_thread, event.sequence_nr)
            return (OTHER if maker is None else self.of(maker)[0]), True
        return (OTHER, False) if event.cpu_parent is None else self.of(event.cpu_parent)

    def _maker(self, thread: int, number: int) -> FunctionEvent | None:
        """The forward operation that made this node."""
        numbers = self._numbers.get(thread, [])
        place = bisect.bisect_right(numbers, number)
        return self._started[thread][numbers[place - 1]] if place else None


def lines(name: str, found: Breakdown) -> Iterator[str]:
    """The table of one step."""
    yield f"{name}: {found.step_ms:.4g} ms a step"
    yield f"  {'phase':12} {'forward ms':>11} {'backward ms':>12} {'share':>7}"
    for phase in (*PHASES, OTHER):
        forward, backward = found.forward.get(phase, 0.0), found.backward.get(phase, 0.0)
        if forward or backward:
            share = (forward + backward) / max(found.step_ms, 1e-9)
            yield f"  {phase:12} {forward:11.4g} {backward:12.4g} {share:7.1%}"
    if found.idle_ms:
        yield f"  {'device idle':12} {found.idle_ms:11.4g} {'':12} {found.idle_ms / found.step_ms:7.1%}"
    wait = found.data_wait_ms / max(found.step_ms, 1e-9)
    yield f"  the host waited for data {found.data_wait_ms:.4g} ms, {wait:.1%} of the step"
