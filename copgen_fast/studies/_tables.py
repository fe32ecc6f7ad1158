"""A study's results as tables: for the terminal, Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from copgen_fast.runtime import artifacts
from copgen_fast.stages.report import table
from copgen_fast.statistics.paired import Difference, Interval
from copgen_fast.statistics.summary import DISTANCE, ArmSummary, Summary
from copgen_fast.studies import _latex

HOLDS_ZERO = "holds 0"
"""Stands beside an interval that does."""
_WIDTH = 120  # characters of a line of notes in the terminal


@dataclass(frozen=True)
class Table:
    """Cells of text, what they are, and what a reader must know of them."""

    title: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def write(summary: Summary, folder: Path) -> None:
    """Write table.txt, table.md, table.tex, table.csv (a row an arm and number) and seeds.csv (a row a value)."""
    files = {
        "table.txt": text(summary) + "\n",
        "table.md": markdown(summary),
        "table.tex": latex(summary),
        "table.csv": numbers_csv(summary),
        "seeds.csv": seeds_csv(summary),
    }
    for name, content in files.items():
        artifacts.write_bytes(folder / name, content.encode())


def tables(summary: Summary) -> tuple[Table, ...]:
    """The table of results and, where it is known which test images were right, that of intervals over images."""
    found = (results_table(summary), images_table(summary))
    return tuple(part for part in found if part.rows)


def results_table(summary: Summary) -> Table:
    """A row an arm: the metric, its difference to the baseline with interval and p, E||dz|| and further numbers."""
    columns = columns_of(summary)
    metric = columns[summary.metric]
    heading = ["arm", "seeds", metric.title, f"difference to {against(summary)} [95 % interval]"]
    cells = [_first_cells(arm, summary, metric) for arm in summary.arms]
    if any(any(row[len(heading) :]) for row in cells):
        heading += ["p", "p (Holm)", "t test p (Holm)"]
    else:  # one seed tests nothing
        cells = [row[: len(heading)] for row in cells]
    further = {name: columns[name] for name in summary.columns if any(name in arm.numbers for arm in summary.arms)}
    if DISTANCE not in further and any(DISTANCE in arm.numbers for arm in summary.arms):
        further = {DISTANCE: table.Column(DISTANCE, None, False)} | further
    for name, column in further.items():
        heading.append("E||dz||" if name == DISTANCE else column.title)
        cells = [[*row, value_text(arm, name, column)] for row, arm in zip(cells, summary.arms, strict=True)]
    for name in dict.fromkeys(number for row in summary.published.values() for number in row):
        column = columns.get(name) or column_of(name)
        heading.append(f"published {column.title}")
        rows = [summary.published.get(arm.name, {}) for arm in summary.arms]
        cells = [
            [*row, number_text(known[name], column) if name in known else ""]
            for row, known in zip(cells, rows, strict=True)
        ]
    if len(summary.baselines) > 1:
        heading.insert(1, "its baseline")
        cells = [[row[0], arm.baseline, *row[1:]] for row, arm in zip(cells, summary.arms, strict=True)]
    return Table(summary.title or "Results", tuple(heading), tuple(map(tuple, cells)), notes(summary))


def images_table(summary: Summary) -> Table:
    """A row an arm: the 95 % intervals of the metric's difference over seeds, over test images, and over both."""
    metric, rows = columns_of(summary)[summary.metric], []
    for arm in summary.arms:
        if known := arm.images:
            row = arm.differences[summary.metric]
            intervals = (row.interval, known.images, known.both)
            rows.append((arm.name, number_text(row.mean, metric, "+"), *(_interval(x, metric) for x in intervals)))
    heading = ("arm", f"difference to {against(summary)}", "over seeds", "over test images", "over seeds and images")
    counts = {arm.images.count for arm in summary.arms if arm.images}
    note = (
        f"Bootstrap over the {' or '.join(map(str, sorted(counts)))} test images, paired by image. Over test images: "
        "these encoders on other images. Over seeds and images: other seeds on other images, too narrow for few seeds."
    )
    title = f"{summary.title or 'Results'}: intervals over seeds and test images"
    return Table(title, heading, tuple(rows), (note,))


def against(summary: Summary) -> str:
    """What arms are compared with."""
    return summary.baseline if len(summary.baselines) == 1 else "its baseline"


def columns_of(summary: Summary) -> dict[str, table.Column]:
    """How each number is shown, as on the report of a run."""
    results = {arm.name: {name: row.mean for name, row in arm.numbers.items()} for arm in summary.arms}
    found = {column.name: column for column in table.columns(results)}
    return found | {name: column_of(name) for name in summary.shown if name not in found}


def column_of(name: str) -> table.Column:
    """How a number is shown by its name alone."""
    return next(iter(table.columns({"": {name: 0.0}})), table.Column(name, None, False))


def _first_cells(arm: ArmSummary, summary: Summary, metric: table.Column) -> list[str]:
    known = arm.numbers.get(summary.metric)
    cells = [arm.name, str(len(known.values)) if known else "0", value_text(arm, summary.metric, metric)]
    if not arm.baseline:
        return [*cells, "baseline", "", "", ""]
    row = arm.differences.get(summary.metric)
    if row is None:
        return [*cells, "no seed in common" if known else "", "", "", ""]
    return [*cells, difference_text(row, known.values, metric), *map(_p, (row.p, row.p_holm, row.t_p_holm))]


def value_text(arm: ArmSummary, name: str, column: table.Column) -> str:
    """Mean ± sample standard deviation of a number; empty where the arm has none."""
    found = arm.numbers.get(name)
    if found is None:
        return ""
    spread = "" if found.sd is None or name == DISTANCE else f" ± {number_text(found.sd, column)}"
    return number_text(found.mean, column) + spread


def difference_text(row: Difference, values: Mapping[int, float], column: table.Column) -> str:
    """Mean difference and interval, and how many pairs it is of where the arm has more seeds."""
    shown = f"{number_text(row.mean, column, '+')} {_interval(row.interval, column)}"
    return shown if row.n == len(values) else f"{shown}, {row.n} paired"


def number_text(value: float, column: table.Column, sign: str = "") -> str:
    """A number, accuracies as per cent."""
    return f"{100 * value:{sign}.2f}" if column.percent else f"{value:{sign}.3g}"


def _interval(interval: Interval | None, column: table.Column) -> str:
    if interval is None:
        return "(one seed)"
    low, high = (number_text(value, column, "+") for value in (interval.low, interval.high))
    return f"[{low}, {high}]" + (f" {HOLDS_ZERO}" if 0 in interval else "")


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3g}"


def notes(summary: Summary) -> tuple[str, ...]:
    """What was compared and how, what the study could have shown, and what is missing."""
    found = _about_seeds(summary)
    if summary.published:
        found.append(f"Published numbers: {summary.source or 'not of these runs'}.")
    known = dict.fromkeys(name for arm in summary.arms for name in arm.numbers)
    if known and (missing := [name for name in summary.shown if name not in known]):
        there = f"there are {', '.join(known)}: choose by --metric and --columns"
        found.append(f"No run gave {', '.join(missing)}; {there}.")
    for arm in summary.arms:
        found += [f"{arm.name}, seed {seed} failed: {error}" for seed, error in arm.failed.items()]
        if arm.waiting:
            found.append(f"{arm.name}: not run yet: seeds {', '.join(map(str, arm.waiting))}.")
    return tuple(found)


def _about_seeds(summary: Summary) -> list[str]:
    """How arms are compared over seeds, and the difference that so many seeds could have shown."""
    if len(summary.seeds) == 1:
        return ["One seed: no interval and no test. Another seed may turn every difference round."]
    if summary.detectable is None:
        return []
    column = columns_of(summary)[summary.metric]
    pairs = max(arm.differences[summary.metric].n for arm in summary.arms if summary.metric in arm.differences)
    baseline = summary.baseline if len(summary.baselines) == 1 else "each arm's baseline"
    comparisons = f"{summary.comparisons} comparison{'s' if summary.comparisons > 1 else ''}"
    unreachable = " (no p here can reach 0.05)" if summary.smallest_p > 0.05 else ""
    points = number_text(summary.detectable, column) + (" points" if column.percent else "")
    return [
        f"± is the sample standard deviation over seeds (n - 1). Differences to {baseline} are paired by seed, "
        f"with Student's t interval. p is of the exact sign-flip test, with {pairs} seeds never below "
        f"{summary.smallest_p:.3g}{unreachable}; p (Holm) is adjusted for {comparisons}, "
        "and so is that of the t test, which takes differences for normal, as the intervals do. Only "
        f"{column.title.removesuffix(' %')} is tested.",
        f"{pairs} seeds could have shown a difference of {points}: with probability 0.8, by a two-sided paired t test "
        "at 0.05, at the typical standard deviation of these differences. Smaller ones would often be missed.",
    ]


def text(summary: Summary) -> str:
    """The tables for the terminal."""
    parts = [summary.title] if summary.title else []
    for part in tables(summary):
        widths = [max(map(len, cells)) for cells in zip(part.heading, *part.rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (part.heading, *part.rows)]
        parts.append("\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]))
        parts.append("\n".join(textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in part.notes))
    return "\n\n".join(parts)


def markdown(summary: Summary) -> str:
    """The tables as GitHub renders them."""
    parts = [f"**{summary.title}**"] if summary.title else []
    for part in tables(summary):
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (part.heading, *part.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([lines[0], "|" + " --- |" * len(part.heading), *lines[1:]]))
        parts += part.notes
    return "\n\n".join(parts) + "\n"


def latex(summary: Summary) -> str:
    """The tables in `table` environments: \\input it in a document that loads booktabs. ° is short for `HOLDS_ZERO`."""
    parts = []
    for part in tables(summary):
        rows = [[cell.replace(f" {HOLDS_ZERO}", "°") for cell in row] for row in part.rows]
        marked = any("°" in cell for row in rows for cell in row)
        notes = (*(["°: the interval holds 0."] if marked else []), *part.notes)
        parts.append(_latex.table(part.title, part.heading, rows, notes))
    return "\n".join([_latex.NEEDS, *parts]) + "\n"


def numbers_csv(summary: Summary) -> str:
    """A row an arm and number, fractions as they are; what is not known is empty."""
    heading = "arm number n mean sd low high baseline pairs difference difference_sd difference_low difference_high"
    heading += " detectable p p_holm t_p t_p_holm images images_low images_high both_low both_high published"
    rows = [heading.split()]
    for arm in summary.arms:
        published = summary.published.get(arm.name, {})
        for name in dict.fromkeys((*arm.numbers, *published)):
            found, row = arm.numbers.get(name), arm.differences.get(name)
            known = arm.images if name == summary.metric else None
            rows.append([arm.name, name])
            rows[-1] += [len(found.values), found.mean, found.sd, *_ends(found.interval)] if found else [""] * 5
            if row:
                rows[-1] += [arm.baseline, row.n, row.mean, row.sd, *_ends(row.interval)]
                rows[-1] += [row.detectable, row.p, row.p_holm, row.t_p, row.t_p_holm]
            else:
                rows[-1] += [""] * 11
            rows[-1] += [known.count, *_ends(known.images), *_ends(known.both)] if known else [""] * 5
            rows[-1].append(published.get(name, ""))
    return _csv(rows)


def seeds_csv(summary: Summary) -> str:
    """A row an arm, seed and number."""
    rows = [["arm", "seed", "number", "value"]]
    for arm in summary.arms:
        rows += [[arm.name, seed, name, x] for name, row in arm.numbers.items() for seed, x in row.values.items()]
    return _csv(rows)


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _csv(rows: list[list[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
