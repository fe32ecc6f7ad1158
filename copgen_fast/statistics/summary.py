"""What a study found, from the numbers of its runs: per arm and number over seeds, and beside the baseline."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from copgen_fast.errors import UsageError
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.stages.run import IMAGES
from copgen_fast.statistics.images import ImageIntervals, bootstrap
from copgen_fast.statistics.paired import (
    Difference,
    Sample,
    detectable_difference,
    difference,
    holm,
    sample,
    smallest_sign_flip_p,
)

DISTANCE = "displacement_norm"
"""E||dz||, the mean distance of positives from their anchors in the latent space."""


@dataclass(frozen=True)
class ArmSummary:
    """One arm's runs.

    Attributes:
        name, settings: the arm's.
        baseline: the arm that it is compared with; empty for a baseline.
        numbers: every number over the seeds that are done.
        differences: to the baseline, of every number; the study's metric is tested. Empty for a baseline.
        images: bootstrap intervals of the metric's difference; None where it is not known which images were right.
        failed: what failed runs said, by seed.
        waiting: seeds that have not run yet.
        reference: whether it is no arm, but the untrained encoder or raw pixels.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""
    numbers: Mapping[str, Sample] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    images: ImageIntervals | None = None
    failed: Mapping[int, str] = field(default_factory=dict)
    waiting: tuple[int, ...] = ()
    reference: bool = False


@dataclass(frozen=True)
class Summary:
    """A study's results.

    Attributes:
        title, preset, baseline, metric, columns, published, source, seeds: the study's.
        arms: in its order, then the references.
        comparisons: how many arms are tested against a baseline.
        detectable: difference in the metric that the study would have shown with 80 % power, at the typical (root mean
            square) sd of its paired differences; None before two seeds are done.
        smallest_p: the smallest p that the sign-flip test of its seeds can give.
    """

    title: str
    preset: str
    baseline: str
    metric: str
    columns: tuple[str, ...]
    published: Mapping[str, Mapping[str, float]]
    source: str
    seeds: tuple[int, ...]
    arms: tuple[ArmSummary, ...]
    comparisons: int
    detectable: float | None
    smallest_p: float

    @property
    def shown(self) -> tuple[str, ...]:
        """The numbers of the table, the metric first."""
        return tuple(dict.fromkeys((self.metric, *self.columns)))

    @property
    def baselines(self) -> tuple[str, ...]:
        """The arms that others are compared with."""
        return tuple(dict.fromkeys((self.baseline, *(arm.baseline for arm in self.arms if arm.baseline))))

    def arm(self, name: str) -> ArmSummary:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def summarize(results: Mapping[str, Any], folder: Path | None = None, resamples: int = 5_000) -> Summary:
    """Statistics of a study's results.json.

    Args:
        results: the study, its runs and its references.
        folder: the study's, where the probes' files tell which test images were right; None: no bootstrap of images.
        resamples: of each bootstrap.

    Raises:
        UsageError: the baseline is no arm.
    """
    study = results["study"]
    runs = [*results["runs"], *results.get("references", ())]
    arms = {arm["name"]: arm.get("settings", {}) for arm in study["arms"]}
    baseline = study.get("baseline") or next(iter(arms))
    if baseline not in arms:
        raise UsageError(f"--baseline {baseline}: it is none of the arms {', '.join(arms)}")
    references = dict.fromkeys(run["arm"] for run in runs if run["arm"] not in arms)
    by_arm = {name: [run for run in runs if run["arm"] == name] for name in (*arms, *references)}
    compared = _compared(arms, baseline, study.get("within", ()))
    for name in references:
        of = [compared[arm] or arm for run in by_arm[name] for arm in run.get("of", ()) if arm in arms]
        compared[name] = baseline if baseline in of or not of else of[0]
    found = []
    for name, of_arm in by_arm.items():
        against = by_arm.get(compared[name], [])
        arm = _arm(name, of_arm, against, study["metric"] if name in arms else "")
        images = _images(folder, of_arm, against, study["metric"], resamples) if folder else None
        about = {"settings": arms.get(name, {}), "baseline": compared[name], "reference": name not in arms}
        found.append(dataclasses.replace(arm, images=images, **about))
    tested = {arm.name: arm.differences[study["metric"]] for arm in found if study["metric"] in arm.differences}
    tested = {name: row for name, row in tested.items() if row.p is not None}
    flips, ts = (holm({name: getattr(row, p) for name, row in tested.items()}) for p in ("p", "t_p"))
    for index, arm in enumerate(found):
        if arm.name in tested:
            row = dataclasses.replace(tested[arm.name], p_holm=flips[arm.name], t_p_holm=ts[arm.name])
            found[index] = dataclasses.replace(arm, differences={**arm.differences, study["metric"]: row})
    return Summary(
        title=study.get("title", ""),
        preset=study.get("preset", ""),
        baseline=baseline,
        metric=study["metric"],
        columns=tuple(study.get("columns", ())),
        published=study.get("published", {}),
        source=study.get("source", ""),
        seeds=tuple(study["seeds"]),
        arms=tuple(found),
        comparisons=len(tested),
        detectable=_detectable(list(tested.values())),
        smallest_p=smallest_sign_flip_p(max((row.n for row in tested.values()), default=len(study["seeds"]))),
    )


def _compared(arms: Mapping[str, Mapping[str, Any]], baseline: str, within: Sequence[str]) -> dict[str, str]:
    """By arm, that which it is compared with: with its values of the settings `within`, and else the baseline's."""

    def key(settings: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
        rest = {name: value for name, value in settings.items() if name not in within}
        return json.dumps([rest, [shared.get(name) for name in within]], sort_keys=True)

    known = {key(settings, settings): name for name, settings in arms.items()}
    found = {name: known.get(key(arms[baseline], settings), baseline) for name, settings in arms.items()}
    return {name: "" if name == other else other for name, other in found.items()}


def _done(runs: list[dict[str, Any]], name: str) -> dict[int, float]:
    """A number's values by seed."""
    return {run["seed"]: run["numbers"][name] for run in runs if name in _numbers(run)}


def _numbers(run: Mapping[str, Any]) -> dict[str, float]:
    return run.get("numbers", {}) if run["state"] == "done" else {}


def _arm(name: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]], tested: str) -> ArmSummary:
    """Numbers and differences of one arm; `tested` is the number that gets a p."""
    values = {number: _done(runs, number) for number in dict.fromkeys(n for run in runs for n in _numbers(run))}
    differences = {n: difference(by_seed, _done(baseline, n), n == tested) for n, by_seed in values.items()}
    return ArmSummary(
        name,
        numbers={number: sample(by_seed) for number, by_seed in values.items()},
        differences={number: row for number, row in differences.items() if row is not None},
        failed={run["seed"]: run.get("error") or "it failed" for run in runs if run["state"] == "failed"},
        waiting=tuple(run["seed"] for run in runs if run["state"] == "waiting"),
    )


def _images(
    folder: Path, runs: list[dict[str, Any]], baseline: list[dict[str, Any]], name: str, resamples: int
) -> ImageIntervals | None:
    """Bootstrap intervals over test images, if all paired runs tell which of the same number of images were right."""
    others = {run["seed"]: run for run in baseline if run["state"] == "done"}
    pairs = [(run, others[run["seed"]]) for run in runs if run["state"] == "done" and run["seed"] in others]
    right = [_correct(folder, run, name) for pair in pairs for run in pair]
    if not right or any(row is None for row in right) or len({len(row) for row in right}) > 1:
        return None
    rows = np.stack(right[::2]) - np.stack(right[1::2])
    return _bootstrapped(rows.tobytes(), len(rows), resamples)


@functools.lru_cache(4096)
def _bootstrapped(rows: bytes, seeds: int, resamples: int) -> ImageIntervals:
    """`bootstrap`, once for the same runs, as a study is summarised after each of its runs."""
    return bootstrap(np.frombuffer(rows, np.int8).reshape(seeds, -1), resamples)


def _correct(folder: Path, run: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Which test images a run's encoder got right, int8 [N]; None for runs of older versions."""
    path = folder / run["folder"] / "probe" / f"{label(run['source'])}{IMAGES}"
    right = artifacts.read_tensors(path).get(name) if path.exists() else None
    return None if right is None else right.numpy().astype(np.int8)


def _detectable(rows: list[Difference]) -> float | None:
    """What the typical comparison would have shown, by the root mean square of the differences' sds."""
    sds = [row.sd for row in rows if row.sd is not None]
    if not sds:
        return None
    return detectable_difference(math.sqrt(np.mean(np.square(sds))), max(row.n for row in rows))
