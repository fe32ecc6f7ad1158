"""Registers, shared memory and spills of the Triton kernels on every generation of GPUs, compiled without a GPU."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from bench.compile import kernels
from bench.compile.instructions import RESULTS, executed
from tests.kernels.conftest import COMPILING, NUMBERS, ROOT

TARGETS = [f"sm_{number}" for number in NUMBERS]
AUGMENT = {
    "filter_kernel",
    "forward_kernel",
    "gather_kernel",
    "pivot_parts_kernel",
    "resized_grad_kernel",
}
INFO_NCE = {
    "factors_kernel",
    "finish_kernel",
    "gradients_kernel",
    "losses_kernel",
    "losses_of_kernel",
    "merge_kernel",
    "triangle_kernel",
    "l2_normalize_backward_kernel",
    "l2_normalize_kernel",
    "weigh_kernel",
}
COND_NORM = {"cond_norm_backward_kernel", "cond_norm_kernel"}
ADD_UPSAMPLED = {"add_upsampled_kernel", "sum_by_four_kernel"}
# What a program may have on sm_86 and newer small ones.
SHARED = 99 * 1024


def test_the_weight_at_the_reach_of_the_filter_is_exactly_zero():
    """1 - distance / reach, contracted to one rounding, is not: a pixel outside would be read, and its NaN spread."""
    command = [sys.executable, "-m", "tests.helpers.triangle_kernel"]
    result = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mul.f32" in result.stdout and "fma.rn.f32" not in result.stdout


@pytest.fixture(scope="module")
def compiled(kernel_cache):
    """Rows of every kernel on every target."""
    report, _ = kernel_cache
    return json.loads(report.read_text())["rows"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert {row["kernel"] for row in rows} == AUGMENT | INFO_NCE | COND_NORM | ADD_UPSAMPLED
    assert all(0 < row["registers"] <= 255 for row in rows)
    limit = {"sm_75": 64 * 1024, "sm_80": 163 * 1024, "sm_90": 227 * 1024}.get(target, SHARED)
    assert all(row["shared_bytes"] <= limit for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(compiled, target):
    # Newer targets give the augmentation registers to spare, and the assembler spills a little nevertheless.
    held = INFO_NCE | COND_NORM | ADD_UPSAMPLED | (AUGMENT if target == "sm_75" else set())
    spilling = [
        row
        for row in compiled
        if row["target"] == target and row["kernel"] in held and row["spill_stores_bytes"] + row["spill_loads_bytes"]
    ]
    assert not spilling


def test_the_committed_results_list_the_same_kernels(compiled):
    everywhere = json.loads((ROOT / "bench" / "results" / "kernels.json").read_text())["rows"]
    committed = [row for row in everywhere if row["target"] in TARGETS]
    assert {row["target"] for row in everywhere} == {f"sm_{number}" for number in kernels.TARGETS}
    names = ("kernel", "variant", "target")
    assert [[row[name] for name in names] for row in committed] == [[row[name] for name in names] for row in compiled]


def test_the_augmentation_executes_no_more_instructions_than_the_committed_file_says(kernel_cache):
    """The numbers may only fall: then run `python -m bench.compile.instructions`."""
    if json.loads(RESULTS.read_text())["versions"]["triton"] != version("triton"):
        pytest.skip("another version of Triton makes other code")
    code = "import json; from bench.compile.instructions import count; print(json.dumps(count(75)))"
    environment = COMPILING | {"TRITON_CACHE_DIR": str(kernel_cache[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    committed = json.loads(RESULTS.read_text())["rows"]
    most = {row["kernel"]: row["per_pixel"] for row in committed if row["target"] == "sm_75"}
    found = {row["kernel"]: row["per_pixel"] for row in json.loads(result.stdout)}
    assert found.keys() == most.keys() == AUGMENT - {"filter_kernel"}
    assert all(found[kernel] <= most[kernel] for kernel in most), found


def test_a_sample_of_two_billion_values_has_offsets_of_64_bits():
    command = [sys.executable, "-m", "tests.helpers.offset_bits"]
    result = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for side, bits in (("64", {32}), ("32768", {64})):
        assert found[side].keys() == COND_NORM | ADD_UPSAMPLED
        assert all(set(kernel) == bits for kernel in found[side].values()), found


def test_instructions_in_loops_count_as_often_as_they_run():
    lines = ["MOV R1, R2 ;", ".L_x_0:", "IADD3 R1, R1 ;", "@P0 BRA `(.L_x_0) ;", "EXIT ;", ".L_x_1:", "BRA `(.L_x_1) ;"]
    sass = "\n".join(line if line.startswith(".L") else f"        /*0000*/                   {line}" for line in lines)
    assert executed(sass + "\n        /*0010*/   NOP ;", (8,)) == 1 + 8 * 2 + 2
