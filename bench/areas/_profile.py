"""Time of a training step by phase, and a Chrome trace of it.

Forward work belongs to the innermost `record_function` mark around it. Backward work belongs to the mark of the forward
operation that it differentiates: autograd numbers its nodes in the order in which forward operations create them, and
the profiler records that number, and the forward thread, with both; accumulating a gradient belongs to the node that
passes it on. All else, as autograd's overhead and the metrics, is `other`. On the CPU, time is that of operations on
their threads; on a GPU, that of the kernels they launch, and the device is idle for the rest of the step.
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
STEP = "bench step"
STEPS = 3


@dataclass
class Breakdown:
    """Milliseconds a step, by phase, of forward and of backward operations.

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
    """Profile a few warm steps; writes FOLDER/NAME.json for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)}.json"
    with artifacts.atomic(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    return breakdown(profiler.events(), device)


def breakdown(events: Iterable[FunctionEvent], device: torch.device) -> Breakdown:
    """Attribute the events of `STEPS` marked steps to phases."""
    on_gpu = device.type == "cuda"
    host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    found = Breakdown(sum(e.cpu_time_total for e in host if e.name == STEP) / STEPS / 1e3)
    phases = Phases(host)
    attributed = 0.0
    for event in host:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent and phases.within_step(event):
            phase, backward = phases.of(event)
            column = found.backward if backward else found.forward
            column[phase] = column.get(phase, 0.0) + spent / STEPS / 1e3
            attributed += spent / STEPS / 1e3
        if event.name == "data":
            found.data_wait_ms += event.cpu_time_total / STEPS / 1e3
    if on_gpu:
        kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        busy = sum(e.time_range.elapsed_us() for e in kernels) / STEPS / 1e3
        found.forward[OTHER] = found.forward.get(OTHER, 0.0) + max(0.0, busy - attributed)
        found.idle_ms = max(0.0, found.step_ms - busy)
    return found


class Phases:
    """The phase of an event, and whether it belongs to the backward pass."""

    def __init__(self, host: list[FunctionEvent]) -> None:
        self._known: dict[int, tuple[str, bool]] = {}
        self._inside: dict[int, bool] = {}
        # Operations by thread and by the number of the next node as they start, the last one of each number: it
        # creates that node and those up to the next operation's number.
        self._started: dict[int, dict[int, FunctionEvent]] = {}
        for e in host:
            if e.sequence_nr >= 0 and not e.fwd_thread:
                self._started.setdefault(e.thread, {})[e.sequence_nr] = e
        self._numbers = {thread: sorted(started) for thread, started in self._started.items()}
        # A GPU's backward thread has no step around it; all its work is of some step.
        self._main = {e.thread for e in host if e.name == STEP}

    def of(self, event: FunctionEvent) -> tuple[str, bool]:
        if id(event) not in self._known:
            self._known[id(event)] = self._find(event)
        return self._known[id(event)]

    def within_step(self, event: FunctionEvent) -> bool:
        if id(event) not in self._inside:
            parent = event.cpu_parent
            self._inside[id(event)] = event.name == STEP or (
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
        """The forward operation that created this node."""
        numbers = self._numbers.get(thread, [])
        place = bisect.bisect_right(numbers, number)
        return self._started[thread][numbers[place - 1]] if place else None


def lines(name: str, found: Breakdown) -> Iterator[str]:
    """The table of one step's phases."""
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
