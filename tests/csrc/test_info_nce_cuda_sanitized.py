"""InfoNCE's CUDA kernels under AddressSanitizer and UBSan on the CPU: arrays in shared memory and registers, too."""

import os
import subprocess

import pytest

from tests.csrc.test_address_sanitizer import COMPILER, ROOT, library

EMULATOR = "tests/helpers/cuda_on_cpu"
# Of the stack only arrays' indices are checked, by UBSan: AddressSanitizer knows one stack, not one a CUDA thread.
FLAGS = "-std=c++17 -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all --param asan-stack=0".split()
pytestmark = pytest.mark.skipif(
    None in (library("libasan.so"), library("libubsan.so")), reason="the C++ compiler comes without sanitizers"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the program of helpers/cuda_on_cpu/sanitized.cpp."""
    program = tmp_path_factory.mktemp("sanitized") / "sanitized"
    include = [f"-I{path}" for path in (EMULATOR, "csrc", "csrc/info_nce")]
    command = [COMPILER, *FLAGS, *include, f"{EMULATOR}/sanitized.cpp", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # of fibers that never end
    return lambda *arguments: subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("reads_beyond", "heap-buffer-overflow"),
        ("writes_before", "heap-buffer-overflow"),
        ("writes_beyond_shared_memory", "global-buffer-overflow"),
        ("indexes_beyond_registers", "out of bounds for type 'float [2]'"),
    ],
)
def test_faults_are_noticed(run, fault, found):
    ended = run("fault", fault)
    assert ended.returncode != 0
    assert found in ended.stderr


def test_random_cases(run):
    assert run("fault", "faultless").returncode == 0
    ended = run("6")
    assert (ended.returncode, ended.stdout) == (0, "6 cases\n"), ended.stderr[-3000:]
