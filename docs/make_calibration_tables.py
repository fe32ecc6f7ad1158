"""Write the tables of calibrated distances into docs/findings.md: python -m docs.make_calibration_tables.

Calibrations are calibration.json of `docs.calibrate_study`, copied to docs/findings/calibration-DATA.json; accuracies
are the same study's, docs/findings/positives-DATA.json. All intervals are over seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import log
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from copgen_fast.statistics.paired import Interval, difference, sample
from docs.make_findings import FOLDER, ROOT, BySeed, Cells, Results, difference_text, shown
from docs.make_speed_tables import markdown

PAGE = ROOT / "docs" / "findings.md"
NUMBERS = {"linear_top1": "linear top-1", "lowshot_top1": "10 labels a class", "knn_top1": "kNN"}
WAYS = {"all": (), "no trained T_z": ("navigator",)}
"""Ways that a table's row is of, and those that it leaves out."""


class Point(NamedTuple):
    """One run of a study.

    Attributes:
        way: of making positives.
        distance: E||dz||.
        relative: that, divided by the distance proposed for the way with the same seed.
        value: accuracy, 0 to 1.
    """

    way: str
    distance: float
    relative: float
    value: float


Predictor = Callable[[Point], float]
PREDICTORS: tuple[Predictor, Predictor] = (lambda point: log(point.distance), lambda point: log(point.relative))
"""The two numbers that are to tell the accuracy: log E||dz||, and log of E||dz|| / proposal."""


def r_squared(points: Sequence[Point], of: Predictor) -> float:
    """The part of the variance of accuracies that a quadratic in the predictor takes off, 0 to 1."""
    x, y = np.array([of(point) for point in points]), np.array([point.value for point in points])
    return float(1 - np.sum((y - np.polyval(np.polyfit(x, y, 2), x)) ** 2) / np.sum((y - y.mean()) ** 2))


def left_out_error(points: Sequence[Point], of: Predictor) -> float:
    """Root mean square error, in points, of a quadratic fitted without the way that it is to predict."""
    errors = []
    for way in {point.way: None for point in points}:
        others = [point for point in points if point.way != way]
        fitted = np.polyfit([of(point) for point in others], [point.value for point in others], 2)
        errors += [np.polyval(fitted, of(point)) - point.value for point in points if point.way == way]
    return 100 * float(np.sqrt(np.mean(np.square(errors))))


def rank_correlation(points: Sequence[Point], of: Predictor) -> float:
    """Spearman's correlation of accuracy and predictor; -1: the nearer, the better."""
    return float(spearmanr([of(point) for point in points], [point.value for point in points]).statistic)


def at_proposals(points: Sequence[Point]) -> float:
    """Accuracy at the distance that is nearest to the proposal by its logarithm, the mean over ways."""
    ways: dict[str, list[Point]] = {}
    for point in points:
        ways.setdefault(point.way, []).append(point)
    return fmean(min(of_way, key=lambda point: abs(log(point.relative))).value for of_way in ways.values())


MEASURES = {
    "R^2 of a quadratic": r_squared,
    "error for a way left out, points": left_out_error,
    "rank correlation": rank_correlation,
}


class Calibration:
    """Distances proposed for the ways of a study, by seed, and the accuracies of its runs."""

    def __init__(self, data: str) -> None:
        self.content = json.loads((FOLDER / f"calibration-{data}.json").read_text())
        self.data = data
        self.seeds: dict[int, list[dict[str, Any]]] = {of["seed"]: of["ways"] for of in self.content["seeds"]}

    @cached_property
    def results(self) -> Results:
        """Of the study, which has been run for accuracies."""
        return Results(f"positives-{self.data}")

    def rows(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Ways by seed; of those trained for each distance, each is one."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for seed, ways in self.seeds.items():
            names = [way["way"] for way in ways]
            for way in ways:
                several = names.count(way["way"]) > 1
                title = f"{way['way']} trained within {way['distances'][0]:g}" if several else way["way"]
                found.setdefault(title, {})[seed] = way
        return found

    def points(self, number: str, value: str, without: Sequence[str] = ()) -> dict[int, list[Point]]:
        """A number of the study's runs with a T_x in pretraining, by seed."""
        proposals = {
            (seed, way["way"], distance): way["proposal"]
            for seed, ways in self.seeds.items()
            for way in ways
            for distance in way["distances"]
        }
        found: dict[int, list[Point]] = {seed: [] for seed in self.seeds}
        for way, other, distance, seed, numbers in self.results.runs():
            if distance is not None and other == value and seed in found and way not in without:
                proposal = proposals[seed, way, distance]
                found[seed].append(Point(way, distance, distance / proposal, numbers[number]))
        return found


def interval_text(interval: Interval, form: str) -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def per_cent(values: Mapping[int, float]) -> str:
    """Mean and its interval over seeds."""
    found = sample({seed: 100 * value for seed, value in values.items()})
    return f"{found.mean:.1f} {interval_text(found.interval, '.1f')}"


def proposals(calibration: Calibration) -> list[Cells]:
    """A row a way: the distance proposed, and how often the class changes there and at a common distance."""
    rows = calibration.rows()
    changed = {
        where: {name: {s: way["class_changes"][where]["changed"] for s, way in of.items()} for name, of in rows.items()}
        for where in ("at_proposal", "at_common")
    }
    common = next(iter(rows.values()))[next(iter(calibration.seeds))]["class_changes"]["at_common"]["distance"]
    title = f"at {common:g}"
    table = [("positives", "proposed E\\|\\|dz\\|\\|", "class changes there, %", f"{title}, %", "difference, points")]
    for name, of in rows.items():
        found = sample({seed: way["proposal"] for seed, way in of.items()})
        at, other = (changed[where][name] for where in changed)
        proposed = f"{found.mean:.2f} {interval_text(found.interval, '.2f')}"
        table.append((name, proposed, per_cent(at), per_cent(other), difference_text(difference(at, other))))
    spread = [
        {seed: stdev(of[seed] for of in ways.values()) for seed in calibration.seeds} for ways in changed.values()
    ]
    cells = (*map(per_cent, spread), difference_text(difference(*spread)))
    return [*table, ("standard deviation of these rows", "", *cells)]


def compared(calibration: Calibration) -> list[Cells]:
    """What the distance tells of accuracy, what the distance over the proposal does, and their difference."""
    table = [("", "T_x", "ways", *NUMBERS.values())]
    for title, measure in MEASURES.items():
        for value in calibration.results.values():
            for ways, without in WAYS.items():
                cells = []
                for number in NUMBERS:
                    points = calibration.points(number, value, without)
                    old, new = ({seed: measure(of, x) for seed, of in points.items()} for x in PREDICTORS)
                    found = difference(new, old)
                    means = f"{fmean(old.values()):.2f}, {fmean(new.values()):.2f}"
                    cells.append(f"{means}: {found.mean:+.2f} {interval_text(found.interval, '+.2f')}")
                table.append((title, value, ways, *cells))
    return table


def nearest(calibration: Calibration) -> list[Cells]:
    """Accuracy with each way at the distance nearest to its proposal, and the difference to all at one distance."""
    results = calibration.results
    distances = results.distances()
    head = (f"difference to all at {distance:g}" for distance in distances)
    table = [("number", "T_x", "ways", "each nearest to its proposal, %", *head)]
    for number, title in NUMBERS.items():
        for value in results.values():
            for ways, without in WAYS.items():
                points = calibration.points(number, value, without)
                chosen: BySeed = {seed: at_proposals(of) for seed, of in points.items()}
                cells = []
                for distance in distances:
                    common = {s: fmean(x.value for x in of if x.distance == distance) for s, of in points.items()}
                    cells.append(difference_text(difference(chosen, common)))
                table.append((title, value, ways, shown(number, chosen), *cells))
    return table


TABLES = {"proposals": proposals, "compared": compared, "nearest": nearest}


def updated(text: str) -> str:
    """A page with its tables as the results are now: those between `<!-- calibration: TABLE DATA -->` and end."""
    pattern = r"(<!-- calibration: (\w+) (\S+) -->\n).*?(<!-- end -->)"

    def table(found: re.Match) -> str:
        return found[1] + markdown(TABLES[found[2]](Calibration(found[3]))) + "\n" + found[4]

    return re.sub(pattern, table, text, flags=re.DOTALL)


def main() -> None:
    """Write them."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
