"""The training loop: schedule, timing, logging, checkpoint cadence, resume. It knows no model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from copgen_fast import artifacts
from copgen_fast.errors import NonFiniteError
from copgen_fast.interrupts import Interrupted, stop_requested
from copgen_fast.metrics import MetricLog, Row


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """How far to run and how often to look up."""

    label: str
    folder: Path
    steps: int
    batch: int
    """Samples a step, for counting."""
    log_every: int
    save_every: int


@dataclass
class Progress:
    """Where a run stands; saved in its checkpoint."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all invocations."""
    waited: float = 0.0
    """Part of it spent waiting for data."""
    finished: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step hands back, all of it still on the device.

    Attributes:
        metrics: scalars to log.
        watched: tensors that must be finite, in the order in which they were computed.
    """

    metrics: dict[str, Tensor]
    watched: dict[str, Tensor]


def run(
    step: Callable[[int, Any], StepResult],
    data: Callable[[int], Any],
    state: dict[str, Stateful],
    plan: Plan,
    stop: Callable[[Row], bool] = lambda row: False,
) -> dict[str, float]:
    """Call `step(i, data(i))` for i up to plan.steps, or until `stop` holds for a looked-at row.

    Everything random in `step` and `data` must depend on i alone: then a run that is killed and started again
    ends in the same state as one that was not. The device is waited for every `plan.log_every` steps only.

    Returns:
        steps, samples, seconds, samples_per_s, data_wait (fraction of the time) and the last row's metrics.

    Raises:
        NonFiniteError: a watched tensor or a metric is NaN or infinite; the last checkpoint precedes it.
        Interrupted: a stop was asked for; the state is saved.
    """
    checkpoint = plan.folder / "checkpoint.pt"
    progress = _restore(checkpoint, state)
    pending: list[tuple[int, StepResult]] = []
    saved = progress.step
    with contextlib.closing(MetricLog(plan.folder, progress.step)) as log, _bar(plan, progress) as bar:
        while not progress.finished:
            started = time.perf_counter()
            with record_function("data"):
                batch = data(progress.step)
            progress.waited += time.perf_counter() - started
            result = step(progress.step, batch)
            pending.append((progress.step, StepResult(result.metrics, _finiteness(result.watched))))
            progress.step += 1
            looking = progress.step % plan.log_every == 0 or progress.step == plan.steps
            if looking or stop_requested():
                rows = _look(pending, plan)
                pending = []
                log.write(rows)
                progress.finished = progress.step == plan.steps or (looking and stop(rows[-1]))
                _describe(bar, rows[-1], progress)
            progress.seconds += time.perf_counter() - started
            bar.update(plan.batch)
            if progress.finished or stop_requested() or (looking and progress.step - saved >= plan.save_every):
                _save(checkpoint, state, progress)
                saved = progress.step
            if stop_requested() and not progress.finished:
                raise Interrupted(
                    f"{plan.label}: stopped at step {progress.step}, state saved; run the same command to go on"
                )
    return _summary(plan, progress)


def _bar(plan: Plan, progress: Progress) -> tqdm:
    return tqdm(total=plan.steps * plan.batch, initial=progress.step * plan.batch, desc=plan.label, unit=" samples")


def _restore(checkpoint: Path, state: dict[str, Stateful]) -> Progress:
    if not checkpoint.exists():
        return Progress()
    saved = artifacts.read_checkpoint(checkpoint)
    for name, holder in state.items():
        holder.load_state_dict(saved["state"][name])
    return Progress(**saved["progress"])


def _save(checkpoint: Path, state: dict[str, Stateful], progress: Progress) -> None:
    states = {name: holder.state_dict() for name, holder in state.items()}
    artifacts.write_checkpoint(checkpoint, {"progress": asdict(progress), "state": states})


def _finiteness(watched: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.isfinite(tensor.detach()).all() for name, tensor in watched.items()}


def _look(pending: list[tuple[int, StepResult]], plan: Plan) -> list[Row]:
    """Bring the numbers of all steps since the last look to the host in one transfer, and check them."""
    numbers = [
        value.detach().double()
        for _, result in pending
        for part in (result.watched, result.metrics)
        for value in part.values()
    ]
    values = iter(torch.stack(numbers).tolist())
    rows = []
    for index, result in pending:
        unfit = [name for name in result.watched if next(values) != 1.0]
        row = {name: next(values) for name in result.metrics}
        unfit += [name for name, value in row.items() if value - value != 0.0]
        if unfit:
            raise NonFiniteError(
                f"{plan.label}: NaN or infinity in {unfit[0]} at step {index}; "
                f"the last good checkpoint is kept in {plan.folder}"
            )
        rows.append({"step": index, "samples": index * plan.batch, **row})
    return rows


def _describe(bar: tqdm, row: Row, progress: Progress) -> None:
    shown = {name: f"{value:.3g}" for name, value in row.items() if name.startswith("loss")}
    bar.set_postfix(shown | {"data_wait": f"{progress.waited / max(progress.seconds, 1e-9):.0%}"}, refresh=False)


def _summary(plan: Plan, progress: Progress) -> dict[str, float]:
    samples = progress.step * plan.batch
    return {
        "steps": progress.step,
        "samples": samples,
        "seconds": progress.seconds,
        "samples_per_s": samples / max(progress.seconds, 1e-9),
        "data_wait": progress.waited / max(progress.seconds, 1e-9),
    }
