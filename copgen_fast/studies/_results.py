"""A study's results: numbers of every run that is done, as one JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from copgen_fast.errors import CopgenError, InUseError, UsageError
from copgen_fast.record import differences
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.statistics.summary import summarize
from copgen_fast.studies import Arm, Study, _page, _tables
from copgen_fast.studies._execute import error_file
from copgen_fast.studies._plan import Planned, Unit, of_folder, plan
from copgen_fast.training.metrics import read_rows

RESULTS, RECORD, LOGS = "results.json", "study.json", "logs"
_WAIT = 120.0
"""Seconds that a command waits for another one to write results."""
_SHARE = 20
"""Tables and page are written again once this many times as long has gone by as they took."""


def collect(study: Study, seeds: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """What the runs in a study's folder have found so far: the content of results.json."""
    return _collect(study, seeds, plan(study, seeds, folder), folder)


def _collect(study: Study, seeds: tuple[int, ...], planned: list[Planned], folder: Path) -> dict[str, Any]:
    return {
        "study": describe(study, seeds),
        "runs": [_entry(run.arm, run.seed, run.source, run.unit, folder) for run in planned],
        "references": list(_references(planned, folder)),
    }


def describe(study: Study, seeds: tuple[int, ...]) -> dict[str, Any]:
    """A study as plain JSON values."""
    return {
        "title": study.title,
        "preset": study.preset,
        "settings": _plain(study.settings),
        "baseline": study.baseline,
        "within": list(study.within),
        "metric": study.metric,
        "columns": list(study.columns),
        "published": {arm: dict(numbers) for arm, numbers in study.published.items()},
        "source": study.source,
        "seeds": list(seeds),
        "arms": [{"name": arm.name, "settings": _plain(arm.settings)} for arm in study.arms],
    }


def _plain(settings: Any) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else list(value) for name, value in settings.items()}


def _references(planned: list[Planned], folder: Path) -> Iterator[dict[str, Any]]:
    """Baselines of each seed, as runs of arms `random` and `pixels`, with the arms that they are `of`.

    Arms of another encoder, data or normalisation have their own: `random of ARM`, ARM the first of them.
    """
    groups: dict[int, dict[Path, list[Planned]]] = {}
    for run in planned:
        if run.baselines is not None:
            groups.setdefault(run.seed, {}).setdefault(run.baselines.folder, []).append(run)
    for seed, group in groups.items():
        for number, runs in enumerate(group.values()):
            unit, own = runs[0].baselines, f" of {runs[0].arm}" if number else ""
            for name in unit.config.probe.baselines:
                yield _entry(name + own, seed, name, unit, folder) | {"of": [run.arm for run in runs]}


def _entry(arm: str, seed: int, source: str, unit: Unit, folder: Path) -> dict[str, Any]:
    run = of_folder(unit)
    numbers, error = {}, None
    if run.probe_file(source).exists():
        try:
            numbers = numbers_of(run, source)
        except CopgenError as fault:
            error = str(fault)
    else:
        error = _error(unit, folder / LOGS)
    state = "failed" if error else "done" if numbers else "waiting"
    where = unit.folder.relative_to(folder).as_posix()
    named = {"arm": arm, "seed": seed, "folder": where, "state": state, "error": error, "source": label(source)}
    return named | {"numbers": numbers}


def _error(unit: Unit, logs: Path) -> str | None:
    """Why a unit that is not done failed, or one that it needs; None where neither did."""
    path = error_file(logs, unit)
    if path.exists():
        return path.read_text(errors="replace").strip()
    found = ((need, _error(need, logs)) for need in unit.needs if not need.done)
    return next((f"{need.name}: {error}" for need, error in found if error), None)


def numbers_of(run: Run, source: str) -> dict[str, float]:
    """Numbers of a source's encoder: of its evaluations, its pairs' distance and its pretraining.

    Raises:
        CorruptArtifactError: a record is altered or missing.
    """
    numbers = artifacts.read_record(run.probe_file(source), dict[str, float])
    numbers.pop("seconds", None)  # of the evaluations
    summary = run.pretrain_folder(source) / "summary.json"
    if summary.exists():
        trained = artifacts.read_record(summary, dict[str, float], ("loss", "seconds"))
        numbers |= {"pretrain_loss": trained["loss"], "seconds": trained["seconds"]}
        numbers |= _last_epoch(run, source) | _distances(trained)
    pairs = run.pairs_folder(source) / "summary.json"
    if pairs.exists():
        numbers |= _distances(artifacts.read_record(pairs, dict[str, float]))
    return numbers


def _last_epoch(run: Run, source: str) -> dict[str, float]:
    """`mi_lower_bound` of pretraining, its mean over the last epoch, as single batches differ."""
    rows = read_rows(run.pretrain_folder(source) / "metrics.jsonl")
    start = (1 - 1 / run.config.pretrain.epochs) * rows[-1]["step"] if rows else 0
    bounds = [row["mi_lower_bound"] for row in rows if row["step"] >= start and "mi_lower_bound" in row]
    return {"mi_lower_bound": statistics.fmean(bounds)} if bounds else {}


def _distances(summary: dict[str, float]) -> dict[str, float]:
    """E||z' - z||, of pairs written or drawn while training, and in each latent group."""
    found = {name: value for name, value in summary.items() if name.startswith("displacement_norm_")}
    mean = {"displacement_norm": summary["displacement_mean"]} if "displacement_mean" in summary else {}
    return mean | found


def reopen(study: Study, seeds: tuple[int, ...], folder: Path) -> tuple[Study, tuple[int, ...]]:
    """The study of a folder with this command's arms and seeds among its own, recorded there.

    Raises:
        UsageError: the folder holds another study, or something else.
    """
    path = folder / RECORD
    with _alone(folder):
        if not path.exists():
            _expect_empty(folder)
            whole, every = study, seeds
        else:
            there = artifacts.read_record(path, needed=("arms", "seeds", "settings"))
            whole, every = _joined(study, seeds, there, folder)
        artifacts.write_record(path, describe(whole, every))
    return whole, every


def _expect_empty(folder: Path) -> None:
    with artifacts.explain_disk(folder):
        present = [path.name for path in folder.iterdir()] if folder.exists() else []
    ours = ("runs", "shared", LOGS, RESULTS)
    if other := [name for name in present if name not in ours and not name.endswith((".lock", ".incomplete"))]:
        raise UsageError(f"--out {folder} holds {min(other)} and no study: choose another --out")


def _joined(study: Study, seeds: tuple[int, ...], there: dict[str, Any], folder: Path) -> tuple[Study, tuple[int, ...]]:
    """The union of two commands' arms and seeds, where all else is the same."""
    here = describe(study, seeds)
    # A metric that no run gave, as its name was mistyped, may still be corrected: nothing can have been chosen by it.
    for name in ("preset", "baseline", *(["metric"] if _tested(there.get("metric"), folder) else [])):
        _expect_same(folder, name, {name: there.get(name)}, {name: here[name]})
    _expect_same(folder, "settings", there["settings"], here["settings"])
    known = {arm["name"]: arm["settings"] for arm in there["arms"]}
    for arm in here["arms"]:
        _expect_same(folder, f"arm {arm['name']}", known.get(arm["name"], arm["settings"]), arm["settings"])
    named = {arm.name for arm in study.arms}
    missing = [Arm(name, _settings(settings)) for name, settings in known.items() if name not in named]
    if missing:
        new = [arm for arm in study.arms if arm.name not in known]
        arms = [*(Arm(name, _settings(settings)) for name, settings in known.items()), *new]
    else:
        arms = list(study.arms)
    every = tuple(sorted({*there["seeds"], *seeds}))
    return dataclasses.replace(study, arms=tuple(arms)), every


def _tested(metric: Any, folder: Path) -> bool:
    """Whether a study's metric is known to exist, or can still turn out to."""
    path = folder / RESULTS
    done = [run["numbers"] for run in artifacts.read_json(path)["runs"] if run["numbers"]] if path.exists() else []
    return not done or any(metric in numbers for numbers in done)


def _expect_same(folder: Path, what: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    if changed := differences(there, here):
        raise UsageError(
            f"--out {folder} holds another study, of other {what}: {'; '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}: choose another --out (seeds and arms may be added)"
        )


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class Writer:
    """Writes results.json after each run; tables and the page as often as costs little, and in the end."""

    def __init__(self, study: Study, seeds: tuple[int, ...], folder: Path) -> None:
        self.study, self.seeds, self.folder = study, seeds, folder
        self.planned = plan(study, seeds, folder)
        self._next = 0.0

    def write(self, last: bool = False) -> str:
        """Write what is due; returns the table and where things are, where it is the `last` time."""
        with _alone(self.folder):
            found = _collect(self.study, self.seeds, self.planned, self.folder)
            artifacts.write_json(self.folder / RESULTS, found)
            done = sum(run["state"] == "done" for run in found["runs"])
            if not done or not (last or time.monotonic() > self._next):
                return self._where(done, found) if last else ""
            started = time.monotonic()
            summary = summarize(found, self.folder)
            _tables.write(summary, self.folder)
            _page.write(found, summary, self.folder)
            self._next = time.monotonic() + _SHARE * (time.monotonic() - started)
            return f"{_tables.text(summary)}\n\n{self._where(done, found)}" if last else ""

    def _where(self, done: int, found: dict[str, Any]) -> str:
        where = [f"{done} of {len(found['runs'])} runs are done", f"numbers: {self.folder / RESULTS}"]
        return "; ".join(where + ([f"page: {self.folder / 'study.html'}"] if done else []))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the study's folder for a moment; waits while another command of the study does.

    Raises:
        InUseError: for longer than it takes.
    """
    until = time.monotonic() + _WAIT
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(artifacts.folder_lock(folder))
                break
            except InUseError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield
