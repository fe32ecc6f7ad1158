"""Kernels compiled once, for all tests that look at them, by whichever process of the tests comes first."""

import fcntl
import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

ROOT = Path(__file__).parents[2]
# Of the six that the committed results have: the oldest, the largest, and the newest, with little shared memory.
NUMBERS = (75, 90, 120)
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
"""The environment of processes that compile; the interpreter compiles nothing."""
COMPILE = f"""
import json, sys
from pathlib import Path
from bench.compile.kernels import compile_all
report, cache = map(Path, sys.argv[1:])
text = json.dumps(compile_all({NUMBERS}, cache))
report.with_suffix(".part").write_text(text)
report.with_suffix(".part").rename(report)
"""


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """File with the rows of every kernel on every target, and Triton's cache of them.

    They are among pytest's folders of this user, for later sessions, which compile only what has changed.
    """
    base = tmp_path_factory.getbasetemp().parent
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "copgen-kernels"
    folder.mkdir(exist_ok=True)
    sources = [Path(__file__), *sorted(ROOT.glob("kernels/*.py")), ROOT / "bench" / "compile" / "kernels.py"]
    state = hashlib.sha256("".join(map(version, ("torch", "triton"))).encode())
    for source in sources:
        state.update(source.read_bytes())
    report = folder / f"kernels-{state.hexdigest()[:16]}.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            command = [sys.executable, "-c", COMPILE, str(report), str(folder / "triton")]
            result = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    return report, folder / "triton"
