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

from copgen_fast.errors import CopgenError, NonFiniteError
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.progress import progress
from copgen_fast.training.metrics import MetricLog, Row


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
    """Samples a step, of all ranks together, for counting."""
    log_every: int
    save_every: int


@dataclass
class Position:
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
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Call `step(i, data(i))` for i up to plan.steps, or until `stop` holds for a looked-at row.

    Everything random in `step` and `data` must depend on i alone: then a run that is killed and started again
    ends in the same state as one that was not. The device is waited for every `plan.log_every` steps only.

    Several ranks run it alike, each with its part of the batch. At each look they exchange their numbers: a metric
    is logged as its mean over ranks, and a NaN or a request to stop on one of them stops all after the same step.

    Returns:
        steps, samples, seconds, samples_per_s, data_wait (fraction of the time) and the last row's metrics.

    Raises:
        NonFiniteError: a watched tensor or a metric is NaN or infinite; the last checkpoint precedes it.
        Interrupted: a stop was asked for; the state is saved.
        LostRankError: a rank is missing.
    """
    checkpoint = plan.folder / "checkpoint.pt"
    position = _restore(checkpoint, state, plan, ranks)
    pending: list[tuple[int, StepResult]] = []
    saved, shown = position.step, {}
    bar = progress(plan.steps * plan.batch, plan.label, initial=saved * plan.batch, disable=not ranks.first)
    with _log(plan, saved, ranks) as log, bar:
        while not position.finished:
            started = time.perf_counter()
            ranks.mark(f"the data of step {position.step} of {plan.label}", watchdog=True)
            with record_function("data"):
                batch = data(position.step)
            position.waited += time.perf_counter() - started
            ranks.mark(f"step {position.step} of {plan.label}", watchdog=True)
            result = step(position.step, batch)
            pending.append((position.step, StepResult(result.metrics, _finiteness(result.watched))))
            position.step += 1
            looking = position.step % plan.log_every == 0 or position.step == plan.steps
            asked = ranks.alone and stop_requested()
            if looking or asked:
                rows, asked = _look(pending, plan, ranks)
                pending = []
                if log is not None:
                    log.write(rows)
                position.finished = position.step == plan.steps or (looking and stop(rows[-1]))
                shown = {name: value for name, value in rows[-1].items() if name.startswith("loss")}
            position.seconds += time.perf_counter() - started
            bar.update(plan.batch, **shown, data_wait=f"{position.waited / position.seconds:.0%}")
            if position.finished or asked or (looking and position.step - saved >= plan.save_every):
                _save(checkpoint, state, position, ranks)
                saved = position.step
            if asked and not position.finished:
                ranks.barrier(f"the stop of {plan.label}")  # not before rank 0 has saved
                raise Interrupted(
                    f"{plan.label}: stopped at step {position.step}, state saved; run the same command to go on"
                )
    ranks.barrier(f"the end of {plan.label}")
    return _summary(plan, position)


def _log(plan: Plan, step: int, ranks: Ranks) -> contextlib.AbstractContextManager:
    return contextlib.closing(MetricLog(plan.folder, step)) if ranks.first else contextlib.nullcontext()


def _restore(checkpoint: Path, state: dict[str, Stateful], plan: Plan, ranks: Ranks) -> Position:
    position = Position()
    if checkpoint.exists():
        saved = artifacts.read_checkpoint(checkpoint)
        for name, holder in state.items():
            holder.load_state_dict(saved["state"][name])
        position = Position(**saved["progress"])
    steps = ranks.barrier(f"the start of {plan.label}", str(position.step))
    if len(set(steps)) > 1:
        raise CopgenError(
            f"{plan.label}: the processes would go on from different steps ({', '.join(steps)}, by rank): {checkpoint} "
            "is not the same file for all; --out must be in a folder that all hosts share"
        )
    return position


def _save(checkpoint: Path, state: dict[str, Stateful], position: Position, ranks: Ranks) -> None:
    if not ranks.first:
        return
    states = {name: holder.state_dict() for name, holder in state.items()}
    artifacts.write_checkpoint(checkpoint, {"progress": asdict(position), "state": states})


def _finiteness(watched: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.isfinite(tensor.detach()).all() for name, tensor in watched.items()}


def _look(pending: list[tuple[int, StepResult]], plan: Plan, ranks: Ranks) -> tuple[list[Row], bool]:
    """Bring the numbers of all steps since the last look to the host in one transfer, and check them.

    Returns:
        The rows to log, the same on all ranks, and whether any of them was asked to stop.
    """
    numbers = [
        value.detach().double()
        for _, result in pending
        for part in (result.watched, result.metrics)
        for value in part.values()
    ]
    numbers.append(torch.full_like(numbers[-1], float(stop_requested())))
    by_rank = iter(ranks.gathered(torch.stack(numbers)[None]).T.tolist())
    rows = []
    for index, result in pending:
        finite = {name: next(by_rank) for name in result.watched}
        metrics = {name: next(by_rank) for name in result.metrics}
        _expect_finite(finite, metrics, index, plan)
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        rows.append({"step": index, "samples": index * plan.batch, **means})
    return rows, any(next(by_rank))


def _expect_finite(finite: dict[str, list[float]], metrics: dict[str, list[float]], index: int, plan: Plan) -> None:
    """Both by name, then by rank: whether a watched tensor is finite (1 or 0), and numbers."""
    unfit = [(name, flags.index(0.0)) for name, flags in finite.items() if 0.0 in flags]
    unfit += [(name, rank) for name, values in metrics.items() for rank, x in enumerate(values) if x - x != 0.0]
    if unfit:
        name, rank = unfit[0]
        where = f" on rank {rank}" if len(next(iter(metrics.values()))) > 1 else ""
        raise NonFiniteError(
            f"{plan.label}: NaN or infinity in {name} at step {index}{where}; "
            f"the last good checkpoint is kept in {plan.folder}"
        )


def _summary(plan: Plan, position: Position) -> dict[str, float]:
    samples = position.step * plan.batch
    return {
        "steps": position.step,
        "samples": samples,
        "seconds": position.seconds,
        "samples_per_s": samples / max(position.seconds, 1e-9),
        "data_wait": position.waited / max(position.seconds, 1e-9),
    }
