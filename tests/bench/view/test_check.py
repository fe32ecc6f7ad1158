"""`python -m bench check`: recorded results beside the targets."""

import dataclasses
import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.view.check import findings, met
from bench.view.targets import MEASURES, TARGETS

RESULTS = Path(__file__).parents[3] / "bench" / "results"
AREAS = ("augment", "info_nce", "generator", "navigator", "loader", "images", "probes")
COMMITTED = [RESULTS / f"{name}-cpu.json" for name in AREAS]
PEERS = ("kornia 1, same parameters", "torchvision 1 per-sample loop, same parameters", "PyTorch 2", "lightly 1")
PEERS = (*PEERS, "copgen_fast chunked backend, no symmetry", "reference form", "same steps, batch at hand")


def row_for(target, better):
    """A row that is about the target and meets it with a tenth to spare, or misses it by that."""
    factor = 1.1 if better == (target.at_least is not None) else 0.9
    value = factor * (target.at_least if target.at_least is not None else target.at_most)
    case = target.case.replace("(half|graph)", "half").replace("B=.*", "B=176")
    precision = "fp16" if target.precision == ".*" else target.precision
    row = {"area": target.area, "case": case, "precision": precision, "direction": target.direction}
    row |= {"device": "cpu" if target.device == "cpu" else "NVIDIA H200", "ours_ms": 1.0, "ratio": 1e-9}
    row |= {"of_limit": 1e-9, "peak_mb": 1e9, "peer": "none", "backend": "pytorch", "ours_spread": 1.0, "n": 5}
    row |= {"peer_ms": 1.0, "limit": "all", "limit_ms": 0.1, "peer_peak_mb": None}
    row["peer"] = next((peer for peer in PEERS if target.about(row | {"peer": peer})), "none")
    batch = int(case.partition("B=")[2].split()[0]) if "B=" in case else 1
    per_s = batch * (2 if target.measure == "views_per_s" else 1)
    changed = {
        "samples_per_s": {"ours_ms": per_s / value * 1e3},
        "views_per_s": {"ours_ms": per_s / value * 1e3},
        "waiting": {"ratio": 1 - value},
    }
    return row | changed.get(target.measure, {target.measure: value})


def write(path, rows):
    path.write_text(json.dumps({"rows": rows}))
    return path


def verdict(path, target):
    return findings((path,))[TARGETS.index(target)].verdict


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.device}-{target.area}-{target.claim}")
def test_each_target_tells_better_from_worse(target, tmp_path):
    assert verdict(write(tmp_path / "a.json", [row_for(target, True)]), target) == "pass"
    assert verdict(write(tmp_path / "b.json", [row_for(target, False)]), target) == "FAIL"
    both = [row_for(target, False), row_for(target, True) | {"precision": target.precision.replace(".*", "bf16")}]
    assert verdict(write(tmp_path / "c.json", both), target) == "pass", "the best counts"
    assert verdict(write(tmp_path / "d.json", []), target) == "not measured"


def test_generators_that_cost_over_a_third_of_a_step_do_not_count(tmp_path):
    target = next(target for target in TARGETS if target.cheap)
    rows = [row_for(target, better) | {"case": f"better {better}", "ours_ms": 2.0 - better} for better in (True, False)]
    for cost, expected in ((0.3, "pass"), (0.4, "FAIL")):
        generation = rows[0] | {"peer": target.cheap, "peer_ms": cost}
        assert verdict(write(tmp_path / "a.json", [*rows, generation]), target) == expected


def test_targets_are_of_one_kind_each():
    for target in TARGETS:
        assert (target.at_least is None) != (target.at_most is None)
        assert target.measure in MEASURES
        assert target.area in (
            "augment",
            "images",
            "info_nce",
            "generator",
            "loader",
            "navigator",
            "online",
            "pretrain",
            "probes",
        )


def test_absolute_numbers_count_on_their_card_only(tmp_path):
    target = next(target for target in TARGETS if target.card)
    path = write(tmp_path / "a.json", [row_for(target, False) | {"device": "NVIDIA GeForce RTX 2080 Ti"}])
    assert verdict(path, target) == "other card"


def test_the_committed_results_meet_the_targets_of_the_cpu(capsys):
    assert main(["check", *map(str, COMMITTED)]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text and text.count("  pass") >= 11


def test_the_exit_code_says_whether_all_was_met(tmp_path, capsys):
    rows = [row_for(target, True) for target in TARGETS if target.device == "cpu"]
    file = write(tmp_path / "a.json", rows)
    assert main(["check", str(file)]) == 0
    assert main(["check", str(file), "--require", "cpu"]) == 0
    assert main(["check", str(file), "--require", "cuda"]) == 1
    without = [row for row in rows if row["precision"] != "bf16"]
    assert main(["check", str(write(tmp_path / "b.json", without)), "--require", "cpu"]) == 0, "not every CPU has bf16"
    assert main(["check", str(write(tmp_path / "b.json", without[1:])), "--require", "cpu"]) == 1
    worse = [*rows[1:], row_for(TARGETS[0], False)]
    assert main(["check", str(write(tmp_path / "c.json", worse))]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_later_file_replaces_what_it_measured_again(tmp_path):
    before = write(tmp_path / "a.json", [row_for(TARGETS[0], False)])
    after = write(tmp_path / "b.json", [row_for(TARGETS[0], True)])
    assert findings((before, after))[0].verdict == "pass"
    assert findings((after, before))[0].verdict == "FAIL"


def test_tests_count_too(tmp_path, capsys):
    name = "test_four_launches_each_way_at_the_papers_batch"
    file = tmp_path / "tests.xml"
    for outcome, expected in (("", "pass"), ("<failure/>", "FAIL"), ("<skipped/>", "not measured")):
        file.write_text(f'<testsuites><testsuite><testcase name="{name}">{outcome}</testcase></testsuite></testsuites>')
        found = findings((file,))
        assert found[-1].verdict == expected
        assert found[-2].verdict == ("pass" if expected == "pass" else "FAIL"), "nothing passed is a failure"
        assert met(found, "none") == (expected == "pass")
    file.write_text("no XML")
    assert main(["check", str(file)]) == 2
    assert main(["check", str(tmp_path / "none.json")]) == 2
    assert "JUnit" in capsys.readouterr().err


def test_rows_without_peak_memory_are_not_taken_for_good_ones(tmp_path):
    target = next(target for target in TARGETS if target.measure == "peak_mb")
    row = row_for(target, True) | {"peak_mb": None}
    assert verdict(write(tmp_path / "a.json", [row]), target) == "not measured"
    assert dataclasses.replace(target, measure="ratio", at_most=None, at_least=1.0).about(row)


@pytest.fixture
def undecided(tmp_path):
    """A file of one row, whose ratio's interval has the target within it; also the target."""
    target = TARGETS[0]
    interval = {"ratio_low": 0.9 * target.at_least, "ratio_high": 2 * target.at_least}
    return write(tmp_path / "a.json", [row_for(target, True) | interval]), target


def test_a_ratio_whose_interval_spans_its_target_is_undecided(undecided, tmp_path, capsys):
    path, target = undecided
    assert verdict(path, target) == "undecided"
    assert main(["check", str(path)]) == 0
    assert f"({target.text(0.9 * target.at_least)} to " in capsys.readouterr().out
    others = [row_for(target, True) for target in TARGETS[1:] if target.device == "cpu"]
    others = str(write(tmp_path / "others.json", others))
    assert main(["check", str(path), others, "--require", "cpu"]) == 1
    for better, word in ((True, "pass"), (False, "FAIL")):
        row = row_for(target, better)
        narrow = row | {"ratio_low": 0.99 * row["ratio"], "ratio_high": 1.01 * row["ratio"]}
        assert verdict(write(tmp_path / "b.json", [narrow]), target) == word


def test_undecided_rows_are_measured_longer_on_request(undecided, tmp_path, monkeypatch, capsys):
    path, target = undecided
    row = row_for(target, True)
    measured = []

    def measure(areas, options):
        measured.append((areas, options.only, options.seconds, options.device))
        options.json.parent.mkdir(exist_ok=True)
        write(options.json, [row | {"ratio_low": row["ratio"], "ratio_high": row["ratio"]}])

    monkeypatch.setattr("bench.__main__.measure", measure)
    assert main(["check", str(path), "--longer", "30", "--out", str(tmp_path / "longer")]) == 0
    assert measured == [((target.area,), row["case"], 30, "cpu")]
    assert "undecided" not in capsys.readouterr().out


def test_nothing_is_measured_longer_on_another_machine(undecided, capsys):
    path, _ = undecided
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": {"cpu": "another one"}}))
    assert main(["check", str(path), "--longer", "30"]) == 2
    assert "another one" in capsys.readouterr().err
