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

from copgen_fast.errors import CopgenError, NonFiniteError
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
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
    progress = _restore(checkpoint, state, plan, ranks)
    pending: list[tuple[int, StepResult]] = []
    saved = progress.step
    with _log(plan, progress, ranks) as log, _bar(plan, progress, ranks) as bar:
        while not progress.finished:
            started = time.perf_counter()
            ranks.mark(f"the data of step {progress.step} of {plan.label}", guarded=True)
            with record_function("data"):
                batch = data(progress.step)
            progress.waited += time.perf_counter() - started
            ranks.mark(f"step {progress.step} of {plan.label}", guarded=True)
            result = step(progress.step, batch)
            pending.append((progress.step, StepResult(result.metrics, _finiteness(result.watched))))
            progress.step += 1
            looking = progress.step % plan.log_every == 0 or progress.step == plan.steps
            asked = ranks.alone and stop_requested()
            if looking or asked:
                rows, asked = _look(pending, plan, ranks)
                pending = []
                if log is not None:
                    log.write(rows)
                progress.finished = progress.step == plan.steps or (looking and stop(rows[-1]))
                _describe(bar, rows[-1], progress)
            progress.seconds += time.perf_counter() - started
            bar.update(plan.batch)
            if progress.finished or asked or (looking and progress.step - saved >= plan.save_every):
                _save(checkpoint, state, progress, ranks)
                saved = progress.step
            if asked and not progress.finished:
                ranks.barrier(f"the stop of {plan.label}")  # not before rank 0 has saved
                raise Interrupted(
                    f"{plan.label}: stopped at step {progress.step}, state saved; run the same command to go on"
                )
    ranks.barrier(f"the end of {plan.label}")
    return _summary(plan, progress)


def _log(plan: Plan, progress: Progress, ranks: Ranks) -> contextlib.AbstractContextManager:
    return contextlib.closing(MetricLog(plan.folder, progress.step)) if ranks.first else contextlib.nullcontext()


def _bar(plan: Plan, progress: Progress, ranks: Ranks) -> tqdm:
    done, everything = progress.step * plan.batch, plan.steps * plan.batch
    return tqdm(total=everything, initial=done, desc=plan.label, unit=" samples", disable=not ranks.first)


def _restore(checkpoint: Path, state: dict[str, Stateful], plan: Plan, ranks: Ranks) -> Progress:
    progress = Progress()
    if checkpoint.exists():
        saved = artifacts.read_checkpoint(checkpoint)
        for name, holder in state.items():
            holder.load_state_dict(saved["state"][name])
        progress = Progress(**saved["progress"])
    steps = ranks.barrier(f"the start of {plan.label}", str(progress.step))
    if len(set(steps)) > 1:
        raise CopgenError(
            f"{plan.label}: the processes would go on from different steps ({', '.join(steps)}, by rank): {checkpoint} "
            "is not the same file for all; --out must be in a folder that all hosts share"
        )
    return progress


def _save(checkpoint: Path, state: dict[str, Stateful], progress: Progress, ranks: Ranks) -> None:
    if not ranks.first:
        return
    states = {name: holder.state_dict() for name, holder in state.items()}
    artifacts.write_checkpoint(checkpoint, {"progress": asdict(progress), "state": states})


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


def _describe(bar: tqdm, row: Row, progress: Progress) -> None:
    shown = {name: f"{value:.3g}" for name, value in row.items() if name.startswith("loss")}
    bar.set_postfix(
        shown | {"data_wait": f"{progress.waited / max(progress.seconds, progress.waited, 1e-9):.0%}"}, refresh=False
    )


def _summary(plan: Plan, progress: Progress) -> dict[str, float]:
    samples = progress.step * plan.batch
    return {
        "steps": progress.step,
        "samples": samples,
        "seconds": progress.seconds,
        "samples_per_s": samples / max(progress.seconds, 1e-9),
        "data_wait": progress.waited / max(progress.seconds, 1e-9),
    }
