"""Tables in LaTeX (booktabs), those of many columns or rows in several parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

NEEDS = "% needs \\usepackage{booktabs,graphicx}"
COLUMNS = 6
"""Of one part, beside the first column."""
ROWS = 32
"""Of one part: a page of `article` holds as many, with heading, caption and notes."""
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}

T = TypeVar("T")
Row = Sequence[str]


def escaped(text: str) -> str:
    """Text as LaTeX sets it: E||dz|| and the signs of numbers in mathematics, two hyphens as such and no dash.

    A bracket at its start is in braces, as \\\\ would take it for the beginning of a distance.
    """
    plain = "".join(_TEX.get(character, character) for character in text.replace("E||dz||", "\0"))
    signed = re.sub(r"(?<![\w.-])([-+])(?=\d)", r"$\1$", plain).replace("--", "-{}-")
    signed = re.sub(r"^\[", "{[}", signed)
    return signed.replace("\0", r"$\mathrm{E}\|dz\|$")


def table(title: str, heading: Row, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A table as one `table` environment, or as several that each begin with the first column.

    Args:
        title: the caption; further parts add "(continued)".
        heading, rows: plain text.
        notes: plain text below the first part.
    """
    parts = [
        [[row[0], *(row[column] for column in columns)] for row in (heading, *some)]
        for some in equal_parts(rows, ROWS)
        for columns in equal_parts(range(1, len(heading)), COLUMNS)
    ]
    found = [_part(title, parts[0], notes), *(_part(f"{title} (continued)", part, ()) for part in parts[1:])]
    return "\n".join(found)


def equal_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Items in as few parts of at most `most` as hold them, their lengths within one of each other."""
    count = -(-len(items) // most)
    bounds = [len(items) * part // count for part in range(count + 1)]
    return [items[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _part(title: str, cells: Sequence[Row], notes: Sequence[str]) -> str:
    """One `table` environment, made smaller where it is wider than the text; the first of `cells` are the heading."""
    heading, *rows = cells
    lines = [" & ".join(row) + r" \\" for row in (map(_stacked, heading), *(map(escaped, row) for row in rows))]
    below = [f"\\par\\medskip\n\\parbox{{\\textwidth}}{{\\footnotesize {escaped(' '.join(notes))}}}"] if notes else []
    return "\n".join(
        [
            "\\begin{table}\n\\centering\\small",
            f"\\caption{{{escaped(title)}}}\n\\medskip",
            "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{"
            f"\\begin{{tabular}}{{@{{}}l{'r' * (len(heading) - 1)}@{{}}}}\n\\toprule",
            *(lines[0], "\\midrule", *lines[1:], "\\bottomrule\n\\end{tabular}}"),
            *below,
            "\\end{table}",
        ]
    )


def _stacked(title: str) -> str:
    """A column's title, what is in brackets below the rest."""
    first, *below = (escaped(line) for line in re.split(r" (?=[(\[])", title))
    return "\\shortstack[r]{" + " \\\\ ".join([first, *below]) + "}" if below else first
