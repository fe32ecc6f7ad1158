"""The training loop of any model: timing, logging, checkpoints, resume, stops, NaN checks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from copgen_fast.errors import CopgenError, NonFiniteError
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.progress import progress
from copgen_fast.training import checkpoints
from copgen_fast.training.checkpoints import Position, Stateful
from copgen_fast.training.metrics import MetricLog, Row


@dataclass(frozen=True)
class Plan:
    """Length of a run, and intervals of logging and checkpoints in steps."""

    label: str
    folder: Path
    steps: int
    batch: int
    """Samples a step, of all ranks together."""
    log_every: int
    save_every: int


@dataclass(frozen=True)
class StepResult:
    """Outputs of a training step, on the device.

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
    """Call `step(i, data(i))` for i up to plan.steps, or until `stop` holds for the last row logged.

    Everything random in `step` and `data` must depend on i alone: then a run that is killed and resumed ends in the
    same state as one that was not. The host waits for the device every `plan.log_every` steps only.

    Every rank runs it with its rows of the batch. Every `plan.log_every` steps they exchange their metrics: the mean
    over ranks is logged, and a NaN or a signal on one rank stops all of them after the same step.

    Returns:
        steps, samples, seconds, samples_per_s, data_wait (fraction of the time).

    Raises:
        NonFiniteError: a watched tensor or a metric is NaN or infinite; the last checkpoint precedes it.
        Interrupted: a signal came; the state is saved.
        LostRankError: a rank is missing.
    """
    checkpoint = plan.folder / "checkpoint.pt"
    position = _restore(checkpoint, state, plan, ranks)
    pending: list[tuple[int, StepResult]] = []
    saved, shown = position.step, {}
    bar = progress(plan.steps * plan.batch, plan.label, initial=saved * plan.batch, disable=not ranks.first)
    log = MetricLog(plan.folder, saved) if ranks.first else None
    with contextlib.closing(log) if log else contextlib.nullcontext(), bar:
        while not position.finished:
            started = time.perf_counter()
            ranks.mark(f"the data of step {position.step} of {plan.label}", watchdog=True)
            with record_function("data"):
                batch = data(position.step)
            position.waited += time.perf_counter() - started
            ranks.mark(f"step {position.step} of {plan.label}", watchdog=True)
            pending.append((position.step, _numbers(step(position.step, batch))))
            position.step += 1
            logging = position.step % plan.log_every == 0 or position.step == plan.steps
            stopping = ranks.alone and stop_requested()
            if logging or stopping:
                rows, stopping = _collect(pending, plan, ranks)
                pending = []
                if log is not None:
                    log.write(rows)
                position.finished = position.step == plan.steps or (logging and stop(rows[-1]))
                shown = {name: value for name, value in rows[-1].items() if name.startswith("loss")}
            position.seconds += time.perf_counter() - started
            bar.update(plan.batch, **shown, data_wait=f"{position.waited / position.seconds:.0%}")
            if position.finished or stopping or (logging and position.step - saved >= plan.save_every):
                if ranks.first:
                    checkpoints.save(checkpoint, plan.label, state, position)
                saved = position.step
            if stopping and not position.finished:
                ranks.barrier(f"the stop of {plan.label}")  # not before rank 0 has saved
                raise Interrupted(
                    f"{plan.label}: stopped at step {position.step}, state saved; run the same command to go on"
                )
    ranks.barrier(f"the end of {plan.label}")
    samples, seconds = position.step * plan.batch, max(position.seconds, 1e-9)
    counts = {"steps": position.step, "samples": samples, "seconds": position.seconds}
    return counts | {"samples_per_s": samples / seconds, "data_wait": position.waited / seconds}


def _restore(checkpoint: Path, state: dict[str, Stateful], plan: Plan, ranks: Ranks) -> Position:
    position = Position()
    if checkpoint.exists():
        position = checkpoints.restore(checkpoint, plan.label, state, plan.steps)
    steps = ranks.barrier(f"the start of {plan.label}", str(position.step))
    if len(set(steps)) > 1:
        raise CopgenError(
            f"{plan.label}: the processes would go on from different steps ({', '.join(steps)}, by rank): {checkpoint} "
            "is not the same file for all; --out must be in a folder that all hosts share"
        )
    return position


def _numbers(result: StepResult) -> StepResult:
    """Metrics and whether watched tensors are finite; without the step's graph, which would stay too long."""
    finite = {name: torch.isfinite(tensor.detach()).all() for name, tensor in result.watched.items()}
    return StepResult({name: value.detach() for name, value in result.metrics.items()}, finite)


def _collect(pending: list[tuple[int, StepResult]], plan: Plan, ranks: Ranks) -> tuple[list[Row], bool]:
    """Copy the numbers of all pending steps to the host in one transfer, and check them.

    Returns:
        The rows to log, the same on all ranks, and whether any rank received a signal to stop.
    """
    numbers = [
        value.double() for _, result in pending for part in (result.watched, result.metrics) for value in part.values()
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
