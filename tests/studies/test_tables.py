"""Tables of a study in every format, and what they say of few seeds, failed runs and intervals that hold 0."""

import csv
import io
import re

import pytest

from copgen_fast.statistics.summary import summarize
from copgen_fast.studies import _tables
from tests.helpers.latex import log_of, needs_latex
from tests.helpers.study_results import GAIN, study_results, write_files


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return summarize(write_files(study_results(), folder), folder, resamples=500)


def cells(table):
    return [dict(zip(table.heading, row, strict=True)) for row in table.rows]


def test_a_row_tells_value_difference_and_distance():
    summary = summarize(study_results())
    table = _tables.results_table(summary)
    assert table.heading == (
        "arm", "seeds", "linear top1 %", "difference to identity [95 % interval]", "p", "p (Holm)",
        "t test p (Holm)", "E||dz||",        "knn top1 %", "mi lower bound", "published linear top1 %",
    )  # fmt: skip
    rows = {row["arm"]: row for row in cells(table)}
    assert list(rows) == [*GAIN, "random", "pixels"]
    found = rows["gaussian d=1.4"]
    assert found["seeds"] == "5" and found["E||dz||"] == "1.4" and found["published linear top1 %"] == "52.33"
    assert re.fullmatch(r"4\d\.\d\d ± \d\.\d\d", found["linear top1 %"])
    assert re.fullmatch(r"\+\d\.\d\d \[\+\d\.\d\d, \+\d\.\d\d\]", found["difference to identity [95 % interval]"])
    assert found["p"] == "0.0625" and found["p (Holm)"] == "0.188" and float(found["t test p (Holm)"]) < 0.001
    assert rows["navigator d=1.4"]["difference to identity [95 % interval]"].endswith("] holds 0")
    assert rows["identity"]["difference to identity [95 % interval]"] == "baseline"
    assert rows["random"]["p"] == rows["random"]["E||dz||"] == ""


def test_the_notes_say_how_and_what_could_have_been_shown():
    notes = "\n".join(_tables.notes(summarize(study_results())))
    assert "n - 1" in notes and "never below 0.0625" in notes and "adjusted for 3 comparisons" in notes
    assert re.search(r"5 seeds could have shown a difference of [01]\.\d\d points", notes)
    assert "Published numbers: Li et al. 2022, Table 3." in notes


def test_one_seed_is_said_to_be_one():
    summary = summarize(study_results(seeds=(3,)))
    table = _tables.results_table(summary)
    assert cells(table)[1]["difference to identity [95 % interval]"].endswith("(one seed)")
    assert "±" not in "".join(cells(table)[1].values()) and not any("p" in title.split() for title in table.heading)
    assert table.notes[0].startswith("One seed: no interval and no test.")


def test_missing_runs_are_told():
    states = {("identity", 1): "failed", ("gaussian d=1.4", 2): "waiting"}
    table = _tables.results_table(summarize(study_results(states=states)))
    assert "identity, seed 1 failed: NaN in the loss" in table.notes
    assert "gaussian d=1.4: not run yet: seeds 2." in table.notes
    assert cells(table)[1]["seeds"] == "4"
    assert ", 3 paired" in cells(table)[1]["difference to identity [95 % interval]"]
    everything = {(name, seed): "waiting" for name in GAIN for seed in range(5)}
    assert "not run yet" in _tables.text(summarize(study_results(states=everything)))


def test_a_metric_that_no_run_gave():
    notes = _tables.notes(summarize(study_results(metric="lbfgs_top1")))
    assert any(note.startswith("No run gave lbfgs_top1; there are linear_top1, knn_top1") for note in notes)


def test_the_terminals_columns_stand_in_line(summary):
    blocks = [block.splitlines() for block in _tables.text(summary).split("\n\n")]
    assert blocks[0] == ["Positives on noise"]
    results, intervals = (block for block in blocks if block[0].startswith("arm"))
    for rows in (results, intervals):
        at = [found.start() for found in re.finditer(r"(?<=  )\S", rows[0])]
        assert all(row[start - 1] == " " for row in rows[2:] for start in at if len(row) > start)
    assert [row.split("  ")[0] for row in intervals[2:]] == [*list(GAIN)[1:], "random", "pixels"]


def test_every_format_has_every_row(summary, tmp_path):
    _tables.write(summary, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.txt",
        "table.md",
        "table.tex",
        "table.csv",
        "seeds.csv",
    }
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert widths == [12] * 8 + [6] * 7
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    row = next(row for row in rows if (row["arm"], row["number"]) == ("gaussian d=1.4", "linear_top1"))
    known = summary.arm("gaussian d=1.4")
    assert float(row["difference"]) == known.differences["linear_top1"].mean and float(row["p"]) == 0.0625
    assert float(row["both_low"]) == known.images.both.low and float(row["published"]) == 0.5233
    long = list(csv.DictReader(io.StringIO((tmp_path / "seeds.csv").read_text())))
    values = {int(x["seed"]): float(x["value"]) for x in long if (x["arm"], x["number"]) == (known.name, "linear_top1")}
    assert values == known.numbers["linear_top1"].values


def test_latex_has_every_table_and_says_what_its_mark_is(summary):
    page = _tables.latex(summary)
    assert page.startswith("% needs \\usepackage{booktabs,graphicx}\n")
    captions = re.findall(r"\\caption\{(.*)\}", page)
    assert captions[0] == "Positives on noise" and captions[-1].startswith("Positives on noise: intervals over")
    assert "holds 0" in re.search(r"\$\^\\circ\$: .*", page)[0] and "$+$0.97]$^\\circ$" in page
    assert "n - 1" in page and "Li et al. 2022, Table 3" in page, "notes"
    assert page.count("\\toprule") == page.count("\\bottomrule") == page.count("\\begin{table}") == len(captions)
    assert "$\\mathrm{E}\\|dz\\|$" in page and "top1 \\%" in page and "$\\pm$" in page and "[$+$" in page
    assert "\\hline" not in page and not re.search(r"\\\\\s*\[", page)  # which LaTeX would take for a distance
    assert not re.search(r"(?<!\\)[%#_]", page.partition("\n")[2]), "none would end the line or fail"


@needs_latex
def test_latex_compiles(summary, tmp_path):
    assert not re.search("Overfull|too large", log_of(_tables.latex(summary), tmp_path))
