"""`python -m bench gpu`: its order, its time budgets and its end, with parts that only write files."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import AREAS, main
from bench.gpu import Part
from bench.view import report
from bench.view.targets import SHOWN_BY_TESTS, TARGETS
from tests.bench.view.test_check import row_for


@pytest.fixture
def measured(tmp_path):
    """Write results and a file of tests as parts do, such that they meet all targets of a GPU, or none."""

    def write(better=True):
        targets = [target for target in TARGETS if target.device == "cuda"]
        rows = [row_for(target, better) for target in targets]
        for row, target in zip(rows, targets, strict=True):
            if better and target.measure != "of_limit":  # it replaces the row of that measurement which has it
                row["of_limit"] = 0.9
        (tmp_path / "augment-gpu.json").write_text(json.dumps({"rows": rows}))
        cases = "".join(f'<testcase name="{name}"/>' for _, _, _, name in SHOWN_BY_TESTS)
        (tmp_path / "tests-kernels.xml").write_text(f"<testsuite>{cases}</testsuite>")

    return write


def part(name, code, seconds=60, **options):
    return Part(name, seconds, ("-c", code), **options)


def test_parts_run_in_order_and_a_failing_one_stops_nothing(tmp_path, capsys):
    order = tmp_path / "order"
    parts = [
        part(name, f"open({str(order)!r}, 'a').write('{name} '); print('ran'); exit({name == 'b'})") for name in "abc"
    ]
    assert gpu.run(parts, tmp_path, 100) == [parts[1]]
    assert order.read_text().split() == ["a", "b", "c"]
    assert capsys.readouterr().out.count("ran") == 3 and (tmp_path / "c.log").read_text() == "ran\n"


# Started in the background by a shell, a process and its children ignore the interrupt.
HANGS = """
import signal
import threading
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("started", flush=True)
    threading.Event().wait()
except KeyboardInterrupt:
    print("kept")
"""


def test_a_part_that_overruns_is_interrupted_and_keeps_what_it_wrote(tmp_path, capsys):
    parts = [part("slow", HANGS, seconds=3), part("next", "")]
    assert gpu.run(parts, tmp_path, 100) == parts[:1]
    assert (tmp_path / "slow.log").read_text() == "started\nkept\n"
    assert "slow: out of time after 3 s" in capsys.readouterr().out


def test_a_part_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "INTERRUPT_SECONDS", 0.1)
    deaf = part("deaf", HANGS.replace("default_int_handler", "SIG_IGN"), seconds=2)
    assert gpu.run([deaf], tmp_path, 100) == [deaf]


def test_parts_for_which_no_time_is_left_are_named(tmp_path, capsys):
    parts = [part("late", "")]
    assert gpu.run(parts, tmp_path, 1) == parts
    assert "late: no time is left" in capsys.readouterr().out


def test_the_exit_code_is_of_required_parts_and_all_targets(measured, tmp_path, capsys, monkeypatch):
    late, optional = part("late", ""), part("optional", "", required=False)
    measured()
    assert gpu.summary(tmp_path, [optional]) == 0
    assert "failed or cut off: optional\n" in capsys.readouterr().out and (tmp_path / "report.html").exists()
    monkeypatch.setattr(report, "write", lambda files, folder: None)  # it takes seconds
    assert gpu.summary(tmp_path, [late]) == 1
    assert len(re.findall(r"^cuda .*  pass$", capsys.readouterr().out, re.MULTILINE)) >= 15
    measured(better=False)
    assert gpu.summary(tmp_path, []) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.fixture
def complete(monkeypatch):
    """A machine that lacks nothing."""
    monkeypatch.setattr(gpu, "missing", lambda: ([], []))


def test_the_command_forgets_earlier_results(complete, measured, tmp_path, monkeypatch, capsys):
    measured()
    monkeypatch.setattr(gpu, "parts", lambda folder: [part("nothing", "")])
    assert main(["gpu", str(tmp_path), "--seconds", "100"]) == 1
    assert "nothing was measured" in capsys.readouterr().out


def test_what_is_missing_is_said_first_and_without_a_gpu_nothing_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "triton_lacks", lambda: "a C compiler: install gcc")
    monkeypatch.setattr(gpu, "INSTALLED", {"reference"})
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("a part was started"))
    assert main(["gpu", str(tmp_path / "results")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("missing: ") for line in lines) and not (tmp_path / "results").exists()
    for name in ("pytest", "xdist", "a GPU", "a C compiler", "pip install triton", "the CUDA extension", "DALI"):
        assert sum(name in line for line in lines) == 1, name


def test_what_only_some_parts_need_stops_nothing(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing", lambda: ([], ["for the DALI loader, the package"]))
    monkeypatch.setattr(gpu, "parts", lambda folder: [part("one", "print('ran')")])
    main(["gpu", str(tmp_path), "--seconds", "100"])
    said = capsys.readouterr().out
    assert said.startswith("missing: for the DALI loader") and "ran" in said


def test_the_budgets_of_all_parts_fit_nine_minutes():
    assert sum(part.seconds for part in gpu.parts(Path("out"))) + 15 <= 540


def test_kernels_that_a_gpu_runs_are_not_emulated_on_the_cpu():
    (part,) = (part for part in gpu.parts(Path("out")) if "tests/csrc/test_info_nce_cuda.py" in part.arguments)
    assert part.arguments[part.arguments.index("-k") + 1] == "gpu"
    assert not any("gpu" in argument for argument in part.arguments if argument.startswith("tests/"))


def test_tests_come_first_and_every_test_that_needs_a_gpu_is_among_them():
    parts = gpu.parts(Path("out"))
    tested = [part.name.startswith("tests-") for part in parts]
    assert tested == sorted(tested, reverse=True), "what is wrong matters more than what is slow"
    assert len({part.name for part in parts}) == len(parts)
    assert {part.arguments[2] for part in parts if part.arguments[1] == "bench"} <= set(AREAS)
    named = {argument for part in parts for argument in part.arguments if argument.startswith("tests/")}
    assert all((gpu.ROOT / name).exists() for name in named)
    needing = {
        str(path.relative_to(gpu.ROOT))
        for path in gpu.ROOT.glob("tests/**/test_*.py")
        if re.search(r"\nfrom tests.helpers.on_gpu|(reason=|skip\()\"(needs a|no) GPU", path.read_text())
    }
    assert len(needing) > 5 and needing <= named, "tests that need a GPU run nowhere else"
