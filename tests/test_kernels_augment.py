"""The Triton kernels: their numbers on the CPU and on a GPU, and what they compile to for every generation of GPUs."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
NUMERICS = Path(__file__).with_name("kernels_augment_numerics.py")
TARGETS = [f"sm_{number}" for number in (75, 80, 86, 89, 90, 120)]
KERNELS = {
    "contrast_parts_kernel",
    "filter_kernel",
    "forward_kernel",
    "gather_kernel",
    "pivot_parts_kernel",
    "resized_grad_kernel",
}


def run(arguments, **environment):
    """A module in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


# Numbers.


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def numerics(request, tmp_path_factory):
    """What every numeric test said on a device: {test function: {case: its failure or None}}."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    report = tmp_path_factory.mktemp("numerics") / "report.xml"
    interpreted = {"TRITON_INTERPRET": "1"} if request.param == "cpu" else {}
    result = run(["pytest", str(NUMERICS), f"--junitxml={report}", "-p", "no:cacheprovider"], **interpreted)
    assert report.exists(), result.stdout + result.stderr
    said = {}
    for case in ET.parse(report).iter("testcase"):
        failures = [child.text for child in case if child.tag in ("failure", "error")]
        said.setdefault(case.get("name").partition("[")[0], {})[case.get("name")] = failures[0] if failures else None
    return said, result.stdout


def numeric_tests():
    lines = NUMERICS.read_text().splitlines()
    return [line[len("def ") :].partition("(")[0] for line in lines if line.startswith("def test_")]


@pytest.mark.parametrize("name", numeric_tests())
def test_numbers(numerics, name):
    said, output = numerics
    assert name in said, output
    failures = [f"{case}\n{text}" for case, text in said[name].items() if text is not None]
    assert not failures, "\n\n".join(failures)


# Compilation.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of every kernel on every target, compiled now."""
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    result = run(["bench.kernels", "--json", str(file)])
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize("target", ["sm_75"])
def test_no_kernel_spills(compiled, target):
    spilling = [
        row for row in compiled if row["target"] == target and row["spill_stores_bytes"] + row["spill_loads_bytes"]
    ]
    assert not spilling


def test_the_committed_results_list_the_same_kernels(compiled):
    committed = json.loads((ROOT / "bench" / "results" / "kernels.json").read_text())["rows"]
    names = ("kernel", "variant", "target")
    assert [[row[name] for name in names] for row in committed] == [[row[name] for name in names] for row in compiled]
