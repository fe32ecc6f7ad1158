"""Numeric tests of kernels in processes of their own: Triton reads TRITON_INTERPRET once, when it is imported."""

import dataclasses
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def run(arguments, **environment):
    """A module in a process of its own, on the GPU unless `environment` has TRITON_INTERPRET."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


def names_in(numerics):
    """The test functions of a file of numeric tests."""
    lines = numerics.read_text().splitlines()
    return [line[len("def ") :].partition("(")[0] for line in lines if line.startswith("def test_")]


def run_numerics(numerics, device, folder):
    """What every test of a file said on a device: {test function: {case: its failure or None}}, and the output."""
    report = folder / "report.xml"
    if device == "cpu" and Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("Triton's interpreter before 3.7 fails under NumPy 2.4 (docs/versions.md)")
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    result = run(["pytest", str(numerics), f"--junitxml={report}", "-p", "no:cacheprovider"], **interpreted)
    assert report.exists(), result.stdout + result.stderr
    said = {}
    for case in ET.parse(report).iter("testcase"):
        failures = [child.text for child in case if child.tag in ("failure", "error")]
        said.setdefault(case.get("name").partition("[")[0], {})[case.get("name")] = failures[0] if failures else None
    return said, result.stdout


def assert_passed(name, said, output):
    assert name in said, output
    failures = [f"{case}\n{text}" for case, text in said[name].items() if text is not None]
    assert not failures, "\n\n".join(failures)


def this_process_device():
    """The device of the process that run_numerics started; there the interpreter stops checking for overflows."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "cuda"
    # A third of the interpreter's time, and wrong where numbers are meant to wrap.
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    return "cpu"
