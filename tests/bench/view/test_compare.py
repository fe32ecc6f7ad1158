"""`python -m bench compare`: changes between two files of results."""

import json
from pathlib import Path

from bench.__main__ import main


def results(path, **changed):
    row = {"area": "augment", "case": "c", "device": "cpu", "precision": "fp32", "direction": "forward"}
    row |= {"backend": "cpp", "ours_ms": 10.0, "ours_spread": 1.1, "peer": "p"} | changed
    path.write_text(json.dumps({"rows": [row, row | {"peer": "q"}]}))
    return str(path)


def test_compare_prints_ratios_and_marks_changes_beyond_the_spread(tmp_path, capsys):
    before = results(tmp_path / "a.json")
    assert main(["compare", before, results(tmp_path / "b.json", ours_ms=5.0, backend="triton")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "augment c, fp32, forward" in line and "2.00x *" in line and "cpp -> triton" in line
    assert main(["compare", before, results(tmp_path / "b.json", ours_ms=9.5)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "1.05x" in lines[1] and "*" not in lines[1]


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    before = results(tmp_path / "a.json")
    assert main(["compare", before]) == 2
    assert main(["compare", before, str(tmp_path / "none.json")]) == 2
    assert main(["compare", before, results(tmp_path / "b.json", device="card")]) == 2
    assert "no row in common" in capsys.readouterr().err


def test_compare_keeps_backends_of_one_case_apart(tmp_path, capsys):
    row = json.loads(Path(results(tmp_path / "a.json")).read_text())["rows"][0]
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"rows": [row, row | {"backend": "graph", "ours_ms": 5.0}]}))
    assert main(["compare", str(file), str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "c, cpp" in lines[1] and "c, graph" in lines[2]
