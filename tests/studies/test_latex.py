"""Tables in LaTeX: nothing is lost, and no part is wider or higher than a page."""

import re

import pytest

from copgen_fast.studies import _latex
from tests.helpers.latex import log_of, needs_latex

HEADING = (
    "arm", "seeds", "linear augmented top1 last %", "difference to untrained-navigator [95 % interval]",
    *(f"published transfer set{number} top1 %" for number in range(12)), "E||dz||",
)  # fmt: skip
ARMS = ("identity", "untrained-navigator", "navigator d=1.4 T_x=none temperature=0.2 delta=None samples=200000")
STACKED = re.compile(r"\\shortstack\[r\]\{(.*)\}$")


def rows_of(arms):
    """Rows whose cells are all different, but for the arms' names."""
    return [
        (arm, str(row), f"{row}.25 ± 0.01", f"-{row}.50 [-3.00, +4.00]°, 2 paired")
        + tuple(f"{row}.{column:03}" for column in range(len(HEADING) - 4))
        for row, arm in enumerate(arms)
    ]


def parts_of(page):
    """Rows of cells of each part, titles of two lines in one."""
    found = re.findall(r"\\toprule\n(.*?)\\bottomrule", page, re.DOTALL)
    rows = [[line for line in part.splitlines() if line.endswith(r" \\")] for part in found]
    cells = [[row.removesuffix(r" \\").split(" & ") for row in part] for part in rows]
    return [[[STACKED.sub(in_one_line, cell) for cell in row] for row in part] for part in cells]


def in_one_line(title):
    return title[1].replace(r" \\ ", " ").replace("{[}", "[")


def test_a_table_that_fits_is_one():
    page = _latex.table("Title", HEADING[:3], [row[:3] for row in rows_of(ARMS[:2])], ["Note."])
    assert page.count("\\begin{table}") == page.count("\\end{table}") == 1
    assert "\\caption{Title}" in page and page.count("Note.") == 1 and "continued" not in page
    (rows,) = parts_of(page)
    assert rows[1:] == [["identity", "0", r"0.25 $\pm$ 0.01"], ["untrained-navigator", "1", r"1.25 $\pm$ 0.01"]]


def test_a_wider_one_is_split_and_loses_nothing():
    rows = rows_of(ARMS)
    page = _latex.table("Title", HEADING, rows, ["Note."])
    parts = parts_of(page)
    assert len(parts) == page.count("\\begin{table}") > 2
    assert re.findall(r"\\caption\{(.*)\}", page) == ["Title", *["Title (continued)"] * (len(parts) - 1)]
    assert page.count("Note.") == 1 and page.index("Note.") < page.index("(continued)")
    for part in parts:
        assert [row[0] for row in part] == [_latex.escaped(cell) for cell in ("arm", *ARMS)]
    joined = [[cell for part in parts for cell in part[row][1:]] for row in range(len(rows) + 1)]
    assert joined == [[_latex.escaped(cell) for cell in row[1:]] for row in (HEADING, *rows)]


@pytest.mark.parametrize(("count", "expected"), [(6, [6]), (7, [3, 4]), (12, [6, 6]), (13, [4, 4, 5])])
def test_parts_are_as_few_as_hold_all_and_about_equal(count, expected):
    parts = _latex.equal_parts(range(count), 6)
    assert [len(part) for part in parts] == expected and [x for part in parts for x in part] == list(range(count))


def test_more_rows_than_a_page_holds_are_split_too():
    arms = [f"arm {number}" for number in range(_latex.ROWS + 2)]
    parts = parts_of(_latex.table("Title", HEADING[:3], [row[:3] for row in rows_of(arms)], ()))
    assert [len(part) - 1 for part in parts] == [_latex.ROWS // 2 + 1] * 2
    assert [row[0] for part in parts for row in part[1:]] == arms


def test_what_a_heading_has_in_brackets_is_below_the_rest():
    page = _latex.table("Title", ("arm", "difference to a [95 % interval]", "p (Holm)"), [("a", "1", "0.5")], ())
    assert r"\shortstack[r]{difference to a \\ {[}95 \% interval]} & \shortstack[r]{p \\ (Holm)} \\" in page
    assert not re.search(r"\\\\\s*\[", page), "LaTeX would take it for a distance"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 % & a_b #1", r"50 \% \& a\_b \#1"),
        ("$ { } ~ ^ \\", r"\$ \{ \} \textasciitilde{} \textasciicircum{} \textbackslash{}"),
        ("1 ± 2 < 3 > 2 | 1", r"1 $\pm$ 2 \textless{} 3 \textgreater{} 2 \textbar{} 1"),
        ("-1 +2.5 [-3, +4] x-1 1e-05 d=1.4", r"$-$1 $+$2.5 [$-$3, $+$4] x-1 1e-05 d=1.4"),
        ("[95 % interval]", r"{[}95 \% interval]"),
        ("E||dz|| of --pairs.count", r"$\mathrm{E}\|dz\|$ of -{}-pairs.count"),
    ],
)
def test_text_is_set_as_it_is(text, expected):
    assert _latex.escaped(text) == expected


@needs_latex
def test_it_compiles_and_nothing_is_wider_or_higher_than_the_page(tmp_path):
    special = "50 % & a_b #1 $ { } ~ ^ \\ ± ° < > | -1 E||dz|| --x"
    many = [row[:4] for row in rows_of(ARMS[:1] * _latex.ROWS)]
    pages = (
        _latex.table("Title", HEADING, rows_of(ARMS), [special]),
        _latex.table("Title", HEADING[:4], many, ["words " * 120]),
    )
    assert not re.search("Overfull|too large", log_of("\n".join(pages), tmp_path))
