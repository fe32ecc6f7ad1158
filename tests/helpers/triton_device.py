"""The device that Triton kernels are tested on: a GPU or, in Triton's interpreter, the CPU (see tests/conftest.py)."""

import dataclasses
import os
from importlib.metadata import version

import pytest
from packaging.version import Version

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

if DEVICE == "cpu":
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        reason = "Triton's interpreter before 3.7 fails under NumPy 2.4 (docs/versions.md)"
        pytest.skip(reason, allow_module_level=True)
    from triton.runtime import interpreter

    # Checks for overflow take a third of the interpreter's time, and fail where numbers are meant to wrap.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
