"""Tables in LaTeX (booktabs), in several parts where one would be wider than the text of `article` or fill its page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NEEDS = "% needs \\usepackage{booktabs}"
TEXT_WIDTH = 345
"""Points that a table may be wide: `article`'s text, and most classes of one column have more."""
MOST_ROWS = 32
"""A page holds as many, and heading, caption and notes."""
_GAP = 3  # points on either side of a column
_WIDEST = 180  # points of a cell, which is else broken over lines
_OF_WIDTH = {2.8: "ijl.,:;'|[]!", 3.7: " frst()°", 5: "0123456789acevxyz/", 5.6: "bdghknopqu_"}
_POINTS = {character: points for points, characters in _OF_WIDTH.items() for character in characters}
"""Width of characters of Computer Modern at 10 point, that of others below 8."""
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
    widths = [_width(column) for column in zip(heading, *rows, strict=True)]
    size = math.ceil(len(rows) / math.ceil(len(rows) / MOST_ROWS))
    parts = [(columns, rows[at : at + size]) for at in range(0, len(rows), size) for columns in split(widths)]
    found = []
    for columns, some in parts:
        cells = [[row[column] for column in columns] for row in (heading, *some)]
        found.append(_part(f"{title} (continued)", cells, ()) if found else _part(title, cells, notes))
    return "\n".join(found)


def split(widths: Sequence[float]) -> list[list[int]]:
    """Columns of each part, the first in all: as few parts as the text is wide enough for, about equally wide."""
    fewest = len(_filled(widths, TEXT_WIDTH))
    limits = range(1, TEXT_WIDTH + 1)
    return next(parts for limit in limits if len(parts := _filled(widths, limit)) == fewest)


def _filled(widths: Sequence[float], limit: float) -> list[list[int]]:
    """Columns in their order, as many in each part as `limit` holds, and at least one beside the first."""
    parts = [[0]]
    for column in range(1, len(widths)):
        if len(parts[-1]) > 1 and sum(widths[other] for other in (*parts[-1], column)) > limit:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _part(title: str, cells: Sequence[Row], notes: Sequence[str]) -> str:
    """One `table` environment; the first of `cells` are the heading."""
    first, *others = zip(*cells, strict=True)
    columns = [_stacked(first, "l"), *(_stacked(column, "r") for column in others)]
    heading, *rows = (" & ".join(row) + r" \\" for row in zip(*columns, strict=True))
    below = [f"\\par\\medskip\n\\parbox{{\\textwidth}}{{\\footnotesize {escaped(' '.join(notes))}}}"] if notes else []
    return "\n".join(
        [
            "\\begin{table}\n\\centering\\small",
            f"\\caption{{{escaped(title)}}}\n\\medskip",
            f"\\setlength{{\\tabcolsep}}{{{_GAP}pt}}",
            f"\\begin{{tabular}}{{@{{}}l{'r' * (len(columns) - 1)}@{{}}}}\n\\toprule",
            *(heading, "\\midrule", *rows, "\\bottomrule\n\\end{tabular}"),
            *below,
            "\\end{table}",
        ]
    )


def _stacked(column: Row, side: str) -> list[str]:
    """A column's cells for LaTeX, those of several lines as small tables: the heading's last line is in its row."""
    cells = [r" \\ ".join(map(escaped, lines)) for lines in _broken(column)]
    return [
        f"\\begin{{tabular}}[{'t' if row else 'b'}]{{@{{}}{side}@{{}}}}{cell}\\end{{tabular}}"
        if r" \\ " in cell
        else cell
        for row, cell in enumerate(cells)
    ]


def _width(column: Row) -> float:
    """Points of a column with the gaps around it."""
    return max(text_width(line) for cell in _broken(column) for line in cell) + 2 * _GAP


def _broken(column: Row) -> list[list[str]]:
    """A column's cells in lines, the heading's as wide as the cells below or its longest word need."""
    heading, *cells = column
    broken = [_lines(cell, _WIDEST) for cell in cells]
    below = max((text_width(line) for cell in broken for line in cell), default=0)
    return [_lines(heading, below), *broken]


def _lines(text: str, limit: float) -> list[str]:
    """Text in lines of at most so many points, where no word is wider."""
    first, *words = re.split(r" (?!%|[^\[]*\])", text)  # not before a % sign, nor in brackets
    limit = max(limit, *map(text_width, [first, *words]))
    lines = [first]
    for word in words:
        if text_width(longer := f"{lines[-1]} {word}") <= limit:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_width(text: str) -> float:
    r"""Points of a line in \small Computer Modern, to a few per cent and rather more than less."""
    return 0.925 * sum(_POINTS.get(character, 8) for character in text)
