"""The C++ operators under AddressSanitizer and UBSan, beside the reference: random calls stay within their tensors."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")
FLAGS = "-std=c++20 -fPIC -O1 -U_FORTIFY_SOURCE -g1 -fno-omit-frame-pointer -fopenmp".split()
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS += ["-Wno-psabi", "-Icsrc"]


def library(name):
    """The compiler's own copy of a library; None without one."""
    if shutil.which(COMPILER) is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


# The last, since errors thrown before the operators are loaded need it there.
PRELOADED = [library("libasan.so"), library("libubsan.so"), library("libstdc++.so.6")]
pytestmark = pytest.mark.skipif(None in PRELOADED, reason="the C++ compiler comes without sanitizers")


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators compiled with both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted(x for x in ROOT.glob("csrc/**/*.cpp") if not x.name.endswith("_cuda.cpp"))
    headers = [f"-I{x}" for x in (*include_paths(), sysconfig.get_paths()["include"])]
    # PyTorch's headers are most of a file's time: compilers take them from beside this one, compiled once.
    common = folder / "common.h"
    common.write_text("#include <ATen/Parallel.h>\n#include <ATen/core/Tensor.h>\n")

    def compile_one(source, made, *options):
        command = [COMPILER, *FLAGS, *headers, *options, str(source), "-o", str(made)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    bindings, *others = sorted(sources, key=lambda source: source.name != "bindings.cpp")
    objects = [folder / f"{source.stem}.o" for source in (bindings, *others)]
    with ThreadPoolExecutor(2) as pool:
        # They need other headers, and touch no tensor's memory.
        compiled = [pool.submit(compile_one, bindings, objects[0], "-O0", "-c")]
        compile_one(common, f"{common}.gch", "-x", "c++-header")
        for source, made in zip(others, objects[1:], strict=True):
            compiled.append(pool.submit(compile_one, source, made, "-include", str(common), "-c"))
    ended = [one.result() for one in compiled]
    assert not any(run.returncode for run in ended), "\n".join(run.stderr for run in ended)
    linked = folder / "_cpp.so"
    torch = [*(f"-L{x}" for x in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, "-shared", *FLAGS, *map(str, objects), *torch, "-o", str(linked)], cwd=ROOT, check=True)
    return linked


@pytest.fixture(scope="module")
def ended(operators):
    """A thousand random calls, and then one that writes beyond a tensor's end."""
    # Python and torch keep memory to the end on purpose.
    options = {"LD_PRELOAD": " ".join(PRELOADED), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / "tests/helpers/sanitized_calls.py"), str(operators), "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_thousand_random_calls(ended):
    assert ended.stdout == "1000 calls\n", ended.stderr[-5000:]


def test_a_write_beyond_the_end_is_noticed(ended):
    assert ended.returncode != 0
    assert "heap-buffer-overflow" in ended.stderr
