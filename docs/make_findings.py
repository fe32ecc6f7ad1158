"""Write the tables and pictures of what studies found, from their results: python -m docs.make_findings.

Results are results.json of the studies' folders, copied to docs/findings/NAME.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from copgen_fast.methods import simclr
from copgen_fast.statistics.paired import Difference, difference, sample
from copgen_fast.statistics.summary import DISTANCE, summarize
from copgen_fast.studies import _charts, _tables
from docs.make_speed_tables import markdown

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "findings"
PAGES = (ROOT / "README.md", ROOT / "docs" / "tutorial.md", ROOT / "docs" / "findings.md")
MOVING = ("gaussian", "untrained-navigator", "navigator", "steering")
CONTRASTS = (
    *((way, "identity") for way in MOVING),
    ("untrained-navigator", "gaussian"),
    ("navigator", "gaussian"),
    ("navigator", "untrained-navigator"),
    ("steering", "gaussian"),
)

CALLED = {"pretrain.augmentation": "T_x", "method.options.temperature": "temperature"}
"""The setting within whose values a study compares its arms, as tables call it."""

FURTHER = {
    "lowshot_top1": "10 labels a class, top-1 %",
    "pairs_agreement_top1": "one class %",
    "mi_lower_bound": "MI bound, nats",
}
"""Further numbers of a table, where there are any."""
COMPARED = ("lowshot_top1",)
"""Those of them whose differences are shown, where the study names them among its columns."""

Cells = tuple[str, ...]
BySeed = Mapping[int, float]


class Results:
    """Numbers of a study's runs by way of making positives, T_x or temperature of pretraining, distance and seed."""

    def __init__(self, name: str) -> None:
        self.content = json.loads((FOLDER / f"{name}.json").read_text())
        self.settings = {arm["name"]: arm["settings"] for arm in self.content["study"]["arms"]}
        (self.within,) = self.content["study"]["within"] or ["pretrain.augmentation"]

    def value(self, settings: Mapping[str, str]) -> str:
        """What an arm's settings have for that within whose values arms are compared."""
        return settings.get(self.within, f"{simclr.Config().temperature:g}")

    def runs(self) -> list[tuple[str, str, float | None, int, dict[str, float]]]:
        """Way, T_x or temperature, distance, seed and numbers of every run that is done and differs in these alone."""
        found = []
        for run in self.content["runs"]:
            settings = self.settings[run["arm"]]
            way = settings["pairs.positives"]
            distance = f"positive.options.{way}.distance"
            known = {"pairs.positives", distance, "navigator.delta", "navigator.project", self.within}
            if run["state"] == "done" and set(settings) <= known:
                at = float(settings[distance]) if distance in settings else None
                found.append((way, self.value(settings), at, run["seed"], run["numbers"]))
        return found

    def distances(self) -> list[float]:
        return sorted({distance for _, _, distance, _, _ in self.runs() if distance is not None})

    def values(self) -> list[str]:
        return list(dict.fromkeys(value for _, value, _, _, _ in self.runs()))

    def by_seed(self, number: str, way: str, value: str, distance: float | None = None) -> BySeed:
        """A number at one distance or, without one, its mean over all, of the seeds that have them all."""
        values: dict[int, list[float]] = {}
        for one, other, at, seed, numbers in self.runs():
            if (one, other) == (way, value) and distance in (None, at) and number in numbers:
                values.setdefault(seed, []).append(numbers[number])
        most = max(map(len, values.values()), default=0)
        return {seed: fmean(found) for seed, found in sorted(values.items()) if len(found) == most}

    def references(self, number: str) -> list[tuple[str, str, BySeed]]:
        """Title, T_x and a number of the untrained encoders and of raw pixels; T_x "" where one stands for all."""
        values: dict[str, BySeed] = {}
        of: dict[str, set[str]] = {}
        for run in self.content["references"]:
            if run["state"] == "done" and number in run["numbers"]:
                values.setdefault(run["arm"], {})[run["seed"]] = run["numbers"][number]
                of.setdefault(run["arm"], set()).update(self.value(self.settings[arm]) for arm in run["of"])
        found: list[tuple[str, set[str], BySeed]] = []
        for name, by_seed in values.items():
            title = {"random": "untrained encoder", "pixels": "raw pixels"}[name.split()[0]]
            equal = [row for row in found if (row[0], row[2]) == (title, by_seed)]
            found += [] if equal else [(title, set(), by_seed)]
            (equal or found[-1:])[0][1].update(of[name])
        return [(title, "" if len(of) == len(self.values()) else min(of), by_seed) for title, of, by_seed in found]


def grid(results: Results, number: str) -> list[Cells]:
    """A row a way and T_x, a column a distance: mean and standard deviation over seeds."""
    distances = results.distances()
    table = [("T_x in pretraining", "positives", *(f"{distance:g}" for distance in distances))]
    for policy in results.values():
        identity = shown(number, results.by_seed(number, "identity", policy))
        table.append((policy, "identity (distance 0)", identity, *[""] * (len(distances) - 1)))
        for way in MOVING:
            cells = (shown(number, results.by_seed(number, way, policy, distance)) for distance in distances)
            table.append((policy, way, *cells))
    for title, policy, values in results.references(number):
        table.append((policy, title, shown(number, values), *[""] * (len(distances) - 1)))
    return table


def shown(number: str, values: BySeed) -> str:
    """Mean and sample standard deviation; accuracies as per cent."""
    if not values:
        return ""
    found, percent = sample(values), number.endswith("top1")
    mean, sd = ((100 * x if percent else x) for x in (found.mean, found.sd or 0))
    return f"{mean:.1f} ± {sd:.1f}" if percent else f"{mean:.2f} ± {sd:.2f}"


def contrasts(results: Results, number: str) -> list[Cells]:
    """Differences between ways, each the mean over all distances, paired by seed; a column a T_x or temperature."""
    called, columns = CALLED[results.within], results.values()
    table = [("", *(f"{called} {value}: points [95 % interval]" for value in columns))]
    for pair in CONTRASTS:
        cells = []
        for column in columns:
            values, other = (results.by_seed(number, way, column) for way in pair)
            cells.append(difference_text(difference(values, other)))
        if any(cells):
            table.append((f"{pair[0]} - {pair[1]}", *cells))
    return table


def difference_text(found: Difference | None) -> str:
    """A difference in accuracy in points, and its interval where there are several seeds."""
    if found is None:
        return ""
    interval = f" [{100 * found.interval.low:+.1f}, {100 * found.interval.high:+.1f}]" if found.interval else ""
    return f"{100 * found.mean:+.1f}{interval}"


def table(results: Results, number: str) -> list[Cells]:
    """A row an arm: the study's tested number, its paired difference to the baseline, the distance, and more."""
    summary = summarize(results.content)
    column = _tables.columns_of(summary)[number]
    further = [name for name in FURTHER if any(name in arm.numbers for arm in summary.arms if not arm.reference)]
    compared = [name for name in further if name in COMPARED and name in summary.columns]
    heading = ("positives", "seeds", column.title, f"difference to {summary.baseline}", "distance E\\|\\|dz\\|\\|")
    titles = ((FURTHER[name], "their difference") if name in compared else (FURTHER[name],) for name in further)
    rows = [(*heading, *(title for several in titles for title in several))]
    for arm in summary.arms:
        values = {name: found.values for name, found in arm.numbers.items()}
        differences = {} if arm.reference else arm.differences
        cells = [arm.name, str(len(values[number])), shown(number, values[number])]
        cells.append(difference_text(differences.get(number)))
        cells.append(f"{fmean(values[DISTANCE].values()):.2f}" if DISTANCE in values else "")
        for name in further:
            cells.append(shown(name, values.get(name, {})))
            cells += [difference_text(differences.get(name))] if name in compared else []
        rows.append(tuple(cells))
    return rows


TABLES = {"grid": grid, "contrasts": contrasts, "table": table}


def updated(text: str) -> str:
    """A page with its tables as the results are now: those between `<!-- findings: TABLE STUDY NUMBER -->` and end."""
    pattern = r"(<!-- findings: (\w+) (\S+) (\w+) -->\n).*?(<!-- end -->)"

    def table(found: re.Match) -> str:
        return found[1] + markdown(TABLES[found[2]](Results(found[3]), found[4])) + "\n" + found[5]

    return re.sub(pattern, table, text, flags=re.DOTALL)


def pictures() -> dict[Path, bytes]:
    """Accuracy against E||dz|| of every study of positives."""
    found = {}
    for path in sorted(FOLDER.glob("positives-*.json")):
        summary = summarize(json.loads(path.read_text()))
        column = _tables.columns_of(summary)[summary.metric]
        found[path.with_suffix(".png")] = _charts.against_distance(summary, column)
    return found


def main() -> None:
    """Write them."""
    for page in PAGES:
        page.write_text(updated(page.read_text()))
    for path, png in pictures().items():
        path.write_bytes(png)


if __name__ == "__main__":
    main()
