"""A table of whatever numbers the evaluations gave, for the terminal and the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Results = dict[str, dict[str, float]]
"""Numbers by name, by source or baseline."""


@dataclass(frozen=True)
class Column:
    """One number of every row.

    Attributes:
        name: the number's.
        spread: name of its standard deviation, shown beside it.
        percent: whether it is an accuracy or an average precision, a fraction shown as per cent.
    """

    name: str
    spread: str | None
    percent: bool

    @property
    def title(self) -> str:
        """Its heading."""
        return self.name.replace("_", " ") + (" %" if self.percent else "")

    def text(self, row: dict[str, float]) -> str:
        """Its value in a row; empty where the row has none."""
        if self.name not in row:
            return ""
        shown = [self._shown(row[name]) for name in (self.name, self.spread) if name in row]
        return " ± ".join(shown)

    def _shown(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.1f}"
        return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def columns(results: Results) -> list[Column]:
    """A column for every number, in the order in which they came; NAME_std stands beside NAME or NAME_top1."""
    names = [name for name in dict.fromkeys(name for row in results.values() for name in row) if name != "seconds"]
    accuracies = {found[1] for name in names if (found := re.match(r"(.+)_top\d+", name))}
    spreads = {name: _spread(name) for name in names if _spread(name) in names}
    return [
        Column(
            name,
            spreads.get(name),
            re.sub(r"_(top\d+.*|[^_]+)$", "", name) in accuracies or re.search(r"_ap\d*$", name) is not None,
        )
        for name in names
        if name not in spreads.values()
    ]


def main(shown: list[Column], evaluations: Sequence[str]) -> list[Column]:
    """The columns to look at first: each evaluation's accuracy or average precision; the first few where none has one.

    Args:
        evaluations: their labels. `EVALUATION_top1` counts, also of 1pct and the like of the labels, and `_ap`.
    """
    names = "|".join(re.escape(name.replace("-", "_")) for name in evaluations)
    found = [column for column in shown if re.fullmatch(rf"({names})(_\d+pct)?_(top1|ap)(_last)?", column.name)]
    return found or shown[:6]


def _spread(name: str) -> str:
    """The number that would be the standard deviation of another one."""
    return f"{name.removesuffix('_top1')}_std"


def text(results: Results) -> str:
    """The table for the terminal."""
    shown = columns(results)
    rows = [["", *(column.title for column in shown)]]
    rows += [[name, *(column.text(row) for column in shown)] for name, row in results.items()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)
