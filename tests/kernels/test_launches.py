"""Every Triton kernel launched by Triton's own launcher, on a stand-in for the CUDA driver with an sm_75 and an sm_90.

What a driver can't see is compared here: each argument with the parameter of the compiled kernel.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from copgen_fast.ops.backend import triton_lacks
from tests.helpers.launches import ANOTHER_STREAM, STREAMS
from tests.kernels.conftest import COMPILING, ROOT
from tests.kernels.test_compile import ADD_UPSAMPLED, AUGMENT, COND_NORM, INFO_NCE

COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(bool(triton_lacks()), reason=f"Triton's launcher needs {triton_lacks()}")
SHARED = (64 * 1024, 227 * 1024)
"""What a block may have of each device's shared memory."""


@pytest.fixture(scope="module")
def launches(kernel_cache, tmp_path_factory):
    """What the driver was given, and what it should have been."""
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, made = ROOT / "tests" / "helpers" / "cuda_driver" / "cuda_driver.c", folder / "libcuda.so.1"
    build = [
        COMPILER,
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{headers}",
        "-Wl,-soname,libcuda.so.1",
        str(source),
        "-o",
        str(made),
    ]
    subprocess.run(build, check=True)
    command = [sys.executable, "-m", "tests.helpers.launches", str(folder), str(kernel_cache[1])]
    result = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("device", [0, 1], ids=["sm_75", "sm_90"])
def test_every_kernel_is_launched(launches, device):
    launched = {launch["kernel"] for launch in launches if launch["device"] == device}
    assert launched == AUGMENT | INFO_NCE | COND_NORM | ADD_UPSAMPLED


def test_each_argument_fits_the_parameter_of_the_compiled_kernel(launches):
    for launch in launches:
        where = f"{launch['kernel']}, {launch['variant']}, device {launch['device']}"
        sizes = [size for _, size in launch["expected"]]
        assert launch["sizes"] == sizes, f"{where}: the launcher passes {sizes} bytes"
        assert launch["values"] == [value for value, _ in launch["expected"]], where


def test_a_launch_is_the_same_from_the_second_on(launches):
    """Which pass Triton's look at the arguments by: it is the one that Triton makes of them."""
    what = ("kernel", "function", "grid", "block", "shared", "numbers")
    made = {"first": {}, "again": {}, "by Triton": {}}
    for launch in launches:
        if isinstance(launch["variant"], list):
            name, time = launch["variant"]
            made[time].setdefault((launch["device"], name), []).append([launch[x] for x in what])
    assert made["first"] and made["first"] == made["again"] == made["by Triton"]


def test_no_kernel_gets_what_it_was_not_compiled_for(launches):
    for launch in launches:
        where = f"{launch['kernel']}, {launch['variant']}, device {launch['device']}"
        assert math.prod(launch["block"]) == launch["threads"], where
        assert not any(value % 16 for value in launch["multiples_of_16"]), where
    assert any(any(launch["multiples_of_16"]) for launch in launches)


def test_grids_and_shared_memory_are_within_the_cards_limits(launches):
    for launch in launches:
        where = f"{launch['kernel']}, {launch['variant']}: {launch['grid']}"
        assert max(launch["grid"][1:]) <= 65535 and 0 < math.prod(launch["grid"]) < 2**31, where
        assert math.prod(launch["block"]) <= 1024 and launch["shared"] <= SHARED[launch["device"]], where
    assert max(math.prod(launch["grid"]) for launch in launches) > 2**20, "large sizes are among them"


def test_a_kernel_for_aligned_tensors_gets_no_others(launches):
    first, second, third = (launch["function"] for launch in launches if "from element" in launch["variant"])
    assert first == third != second


def test_a_launch_that_one_device_remembers_is_not_anothers(launches):
    """Blocks of an sm_75 have fewer rows than those of an sm_90."""
    grids = [set(), set()]
    for launch in launches:
        wanted = launch["variant"] == ["copgen_fast.kernels.info_nce, float16 M=16384 gradients", "again"]
        if wanted and launch["kernel"] == "gradients_kernel":
            grids[launch["device"]].add(tuple(launch["grid"]))
    (first,), (second,) = grids
    assert first[0] > second[0]


def test_launches_go_to_the_current_stream_of_the_tensors_device(launches):
    *others, second, before, after = launches
    assert all(launch["stream"] == STREAMS[launch["device"]] for launch in (*others, second, before))
    assert second["variant"] == "on the second device" and second["device"] == 1, "where the first one is current"
    assert before["function"] == after["function"] and after["stream"] == ANOTHER_STREAM, "remembered for no stream"
