"""Charts of a study: values and differences by seed, accuracy against E||dz||, training curves over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from copgen_fast.stages.report.figures import COLOURS, panels, png
from copgen_fast.stages.report.table import Column
from copgen_fast.statistics.summary import DISTANCE, ArmSummary, Summary
from copgen_fast.studies._tables import against
from copgen_fast.training.metrics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = len(COLOURS)
"""Most curves of a chart: as many as there are colours."""
_GREY = "#8c959f"
_WAY = "pairs.positives"
_OF_DISTANCE = {"distance", "delta", "std", "scale", "radius"}
"""Last words of settings that decide how far positives are from their anchors."""


def dots(summary: Summary, column: Column) -> bytes:
    """Each arm's values by seed and their mean; beside them its paired differences with their mean and interval."""
    arms = [arm for arm in summary.arms if summary.metric in arm.numbers]
    left, right = panels(10.4, 0.34 * len(arms) + 1.1, 2)
    scale = 100 if column.percent else 1
    for row, arm in enumerate(arms):
        known, colour = arm.numbers[summary.metric], _GREY if arm.reference else COLOURS[0]
        _row(left, row, [scale * x for x in known.values.values()], scale * known.mean, colour)
        if found := arm.differences.get(summary.metric):
            mean, interval = scale * found.mean, found.interval
            _row(right, row, [scale * x for x in found.values.values()], mean, colour)
            if interval:
                ends = [[mean - scale * interval.low], [scale * interval.high - mean]]
                right.errorbar([mean], [row], xerr=ends, color=colour, capsize=3, linewidth=1.4)
    left.set_yticks(range(len(arms)), [arm.name for arm in arms])
    left.invert_yaxis()
    left.set_xlabel(f"{column.title}: seeds and their mean")
    right.axvline(0, color=_GREY, linestyle="--", linewidth=1)
    right.set_xlabel(f"difference to {against(summary)}: seeds, mean, 95 % interval")
    return png(left)


def _row(axes: Axes, row: int, values: Sequence[float], mean: float, colour: str) -> None:
    axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
    axes.plot([mean], [row], "|", color=colour, markersize=13, markeredgewidth=2)


def against_distance(summary: Summary, column: Column) -> bytes | None:
    """The metric against E||dz||, a line for arms that differ in distance alone; None where no arm has a distance."""
    groups: dict[str, list[ArmSummary]] = {}
    for arm in summary.arms:
        if not arm.reference and {DISTANCE, summary.metric} <= arm.numbers.keys():
            groups.setdefault(group_of(arm, summary), []).append(arm)
    if not groups:
        return None
    (axes,) = panels(7.2, 4.2)
    scale = 100 if column.percent else 1
    for index, (name, arms) in enumerate(groups.items()):
        arms = sorted(arms, key=lambda arm: arm.numbers[DISTANCE].mean)
        colour, line, marker = style_of(index)
        x, found = [arm.numbers[DISTANCE].mean for arm in arms], [arm.numbers[summary.metric] for arm in arms]
        for at, known in zip(x, found, strict=True):
            y = [scale * value for value in known.values.values()]
            axes.plot([at] * len(y), y, marker, color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
        means = [scale * known.mean for known in found]
        axes.plot(x, means, line, color=colour, marker=marker, markersize=6, linewidth=1.4, label=name)
    low, high = axes.get_ylim()
    levels: dict[float, list[str]] = {}
    for arm in summary.arms:
        if arm.reference and summary.metric in arm.numbers:
            levels.setdefault(scale * arm.numbers[summary.metric].mean, []).append(arm.name)
    for level, names in levels.items():
        if low - (high - low) < level < high + (high - low):  # one far away would flatten the lines
            axes.axhline(level, color=_GREY, linestyle=":", linewidth=1.2)
            at, place = (1, level), {"ha": "right", "va": "bottom", "fontsize": 8}
            axes.annotate(", ".join(names), at, xycoords=("axes fraction", "data"), color=_GREY, **place)
    axes.set_xlabel("E||dz||")
    axes.set_ylabel(column.title)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(axes)


def style_of(index: int) -> tuple[str, str, str]:
    """Colour, line and marker of a group of points: once the colours are used up, the others tell groups apart."""
    return COLOURS[index % LINES], *(("-", "o"), ("--", "s"), (":", "^"))[index // LINES % 3]


def group_of(arm: ArmSummary, summary: Summary) -> str:
    """What an arm shares with those that differ from it in distance alone: its way of making positives, and other
    settings that vary; its name where arms don't differ in distance.
    """
    arms = [other for other in summary.arms if not other.reference]
    if not any(_is_distance(name) for other in arms for name in other.settings):
        return arm.name
    words = [_word(name, value) for name, value in arm.settings.items() if name == _WAY or _tells(name, arm, arms)]
    return ", ".join(words) or "as the study"


def _tells(name: str, arm: ArmSummary, arms: Sequence[ArmSummary]) -> bool:
    """Whether a setting is no distance, varies, and not just because one way of making positives has it."""
    alike = [other for other in arms if other.settings.get(_WAY) == arm.settings.get(_WAY)]
    of_others = any(name in other.settings for other in arms if other not in alike)
    values = {str(other.settings.get(name)) for other in (arms if of_others else alike)}
    return not _is_distance(name) and len(values) > 1


def _is_distance(name: str) -> bool:
    return name.rpartition(".")[2] in _OF_DISTANCE


def _word(name: str, value: str | Sequence[str]) -> str:
    text = value if isinstance(value, str) else " ".join(value)
    return text if name == _WAY else f"{name.rpartition('.')[2]} {text}"


def curves(logs: Mapping[str, Sequence[Sequence[Row]]], number: str = "loss") -> bytes:
    """A logged number against the step: its mean over seeds and, as a band, the sample standard deviation.

    Args:
        logs: by arm, the rows of each seed; at most `LINES` arms.
    """
    (axes,) = panels(7.2, 3.0)
    for colour, (name, of_seeds) in zip(COLOURS, logs.items(), strict=False):
        by_step = [{int(row["step"]): row[number] for row in rows if number in row} for rows in of_seeds]
        steps = sorted(set.intersection(*map(set, by_step)))
        values = np.array([[rows[step] for step in steps] for rows in by_step])
        mean = values.mean(0)
        axes.plot(steps, mean, label=name, color=colour, linewidth=1.4)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(number)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(axes)
