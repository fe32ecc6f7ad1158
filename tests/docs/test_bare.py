"""What works without a compiler and without network: the cheap part of tests/bare.sh."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux namespaces")
def test_a_bare_container():
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run([ROOT / "tests" / "bare.sh", "--quick"], env=environment, capture_output=True, text=True)
    if ended.returncode == 77:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) >= 7 and all(line.startswith("ok ") for line in lines)
