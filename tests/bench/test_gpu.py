"""bench/gpu.sh: its order, its limits of time and its end, with a Python that only pretends to measure."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import AREAS
from bench.view.targets import SHOWN_BY_TESTS, TARGETS
from tests.bench.view.test_check import row_for

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"

# Writes what was prepared to the file that it is asked for; reads results truly.
PRETENDER = """#!{python}
import os, shutil, sys, time
arguments = sys.argv[1:]
if arguments[:3] == ["-m", "bench", "report"] and {fails!r}:
    sys.exit()
if arguments[:3] in (["-m", "bench", "check"], ["-m", "bench", "report"]):
    os.execv({python!r}, [{python!r}, *arguments])
name = arguments[2 if arguments[1] == "bench" else 1]
with open({folder!r} + "/order", "a") as file:
    file.write(name + "\\n")
print("measured", name)
for option in ("--json", "--junitxml"):
    if option in arguments:
        shutil.copy({folder!r} + "/prepared" + (".json" if option == "--json" else ".xml"),
                    arguments[arguments.index(option) + 1])
if name == {hangs!r}:
    time.sleep(60)
sys.exit(name == {fails!r})
"""


@pytest.fixture
def start(tmp_path):
    """Run the script where every part leaves rows that meet all targets, or none where `better` is false."""

    def run(*, better=True, fails="", hangs="", seconds=100):
        targets = [target for target in TARGETS if target.device == "cuda"]
        rows = [row_for(target, better) for target in targets]
        for row, target in zip(rows, targets, strict=True):
            if better and target.measure != "of_limit":  # it replaces the row of that measurement which has it
                row["of_limit"] = 0.9
        (tmp_path / "prepared.json").write_text(json.dumps({"rows": rows}))
        cases = "".join(f'<testcase name="{name}"/>' for _, _, _, name in SHOWN_BY_TESTS)
        (tmp_path / "prepared.xml").write_text(f"<testsuite>{cases}</testsuite>")
        python = tmp_path / "python"
        python.write_text(PRETENDER.format(python=sys.executable, folder=str(tmp_path), fails=fails, hangs=hangs))
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "SECONDS_IN_ALL": str(seconds)}
        command = ["sh", str(SCRIPT), str(tmp_path / "out")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    return run


def test_all_parts_run_and_all_numbers_are_judged(start, tmp_path):
    result = start()
    assert result.returncode == 0, result.stdout + result.stderr
    order = (tmp_path / "order").read_text().split()
    assert order[:3] == ["pytest", "navigator", "pretrain"]
    assert {"augment", "info_nce", "generator", "loader"} <= set(order)
    assert len(re.findall(r"^ +\d  cuda .*  pass$", result.stdout, re.MULTILINE)) >= 15
    assert "FAIL" not in result.stdout and "not measured" not in result.stdout.partition("cuda")[2]
    assert {"report.html", "navigator-gpu.json", "tests-kernels.xml"} <= {x.name for x in (tmp_path / "out").iterdir()}


def test_a_failing_part_and_a_missed_number_stop_nothing_and_are_named(start, tmp_path):
    result = start(better=False, fails="navigator")
    assert result.returncode == 1
    assert "navigator ended with code 1" in result.stdout and "failed or cut off: navigator\n" in result.stdout
    assert "FAIL" in result.stdout
    assert "loader" in (tmp_path / "order").read_text()


def test_what_takes_too_long_is_cut_off_and_keeps_its_rows(start, tmp_path):
    result = start(hangs="pytest", fails="none", seconds=20)
    assert result.returncode == 1
    assert "tests-kernels ended with code 124" in result.stdout and "no time is left" in result.stdout
    assert (tmp_path / "out" / "tests-kernels.xml").exists()


def test_it_asks_for_what_there_is():
    text = SCRIPT.read_text()
    files = re.findall(r"tests/\S+\.py", text)
    assert files and all(list(ROOT.glob(name)) for name in files)
    assert set(re.findall(r"^measure (\w+) ", text, re.MULTILINE)) <= {*AREAS, "loader"}
    needing = {
        x.name for x in ROOT.glob("tests/test_*.py") if re.search(r"(reason=|skip\()\"(needs a|no) GPU", x.read_text())
    }
    named = {x.name for name in files for x in ROOT.glob(name)}
    assert len(needing) > 5 and needing <= named, "tests that need a GPU run nowhere else"
