"""Backends of the ops: which are installed, and which one runs by default for a device and dtype."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# The modules that a backend needs beside torch.
_MODULES = {
    "cpp": ("copgen_fast._cpp",),
    "cuda": ("copgen_fast._cpp", "copgen_fast._cuda"),
    "triton": ("triton",),
}


def installed() -> set[str]:
    """Names of the backends that are there with all modules they need."""
    return {"reference", "chunked", *(name for name, need in _MODULES.items() if all(map(find_spec, need)))}


INSTALLED = installed()
"""Names of the backends of this installation, whatever the device."""


def triton_lacks() -> str | None:
    """What keeps Triton from launching on a GPU; None: nothing does. A constant where a function is compiled."""
    return launcher_lacks()


# As torch.compiler.assume_constant_result does, which would import PyTorch's compiler, and that Triton.
triton_lacks._dynamo_marked_constant = True


@functools.cache
def launcher_lacks() -> str | None:
    """What Triton's launcher lacks, which it compiles in C at first use.

    PyTorch's compiler looks through a cache, and can't trace a look at files: hence `triton_lacks`.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "a C compiler: install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    # As Triton looks for it: Debian's own scheme names a folder that it leaves empty.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else f"{header}: install Python's headers (python3-dev)"


_HINT = {
    "cpp": "the C++ extension is not built: install again where a C++ compiler is, with --no-build-isolation",
    "cuda": "the CUDA extension is not built: install again where nvcc is, with --no-build-isolation",
    "triton": "on a GPU it needs the package triton; on the CPU it runs only under TRITON_INTERPRET=1, slowly",
}

# Per op and device type, fastest first; other device types run the reference.
_FASTEST: dict[str, dict[str, tuple[str, ...]]] = {
    "augment": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "rand_augment": {"cpu": ("cpp", "reference"), "cuda": ("reference",)},
    "info_nce": {"cpu": ("cpp", "chunked", "reference"), "cuda": ("triton", "cuda", "chunked", "reference")},
    "l2_normalize": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "cond_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "conv3x3": {"cpu": ("cpp", "reference"), "cuda": ("reference",)},
    "add_upsampled": {"cpu": ("reference",), "cuda": ("triton", "reference")},
}

# The inputs for which a GPU's backend is the default, where these are not all.
_INPUTS = {
    (
        "info_nce",
        "triton",
    ): "sm_80 and newer, not float64, D up to 512: on sm_75 Triton makes no tensor-core instruction",
    ("info_nce", "cuda"): "sm_75 and newer, float16, D up to 512; rounds other dtypes to float16",
}
# Beyond it the fused backward computes similarities again for each part of D: large products are faster.
_FUSED_DIMENSION = 512


@functools.cache
def load(backend: str, op: str) -> Any:
    """The compiled functions of `op`, as a module or a namespace of operators; each fills its last arguments."""
    if backend == "triton":
        return import_module(f"copgen_fast.kernels.{op}")
    import_module("copgen_fast._cpp")  # declares the operators, also those that _cuda implements
    if backend == "cuda":
        import_module("copgen_fast._cuda")
    return torch.ops.copgen_fast_cpp


def backends() -> dict[str, dict[str, str]]:
    """The default backend of each op for float32 inputs: {op: {device type: backend}}.

    "cuda" is the first GPU, or sm_80 where there is none.
    """
    return {op: {device: resolve(op, device) for device in table} for op, table in _FASTEST.items()}


def resolve(
    op: str,
    device: torch.device | str,
    backend: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    dimension: int = 128,
) -> str:
    """Name of the backend that runs `op` on `device`: `backend` itself, or the fastest for None.

    The input's dtype and dimension decide for info_nce on a GPU.

    Raises:
        ValueError: `backend` does not exist for this op and device, or is not installed; the message lists
            those that do.
    """
    device = torch.device(device)
    every = _FASTEST[op].get(device.type, ("reference",))
    if backend is None:
        return next(x for x in every if runs(x, device) and _is_default(op, x, device, dtype, dimension))
    names = [name for name in every if runs(name, device)]
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and "triton" in INSTALLED
    if interpreted and "triton" in _FASTEST[op]["cuda"]:
        names.append("triton")
    if backend not in names:
        hint = f" ({_hint(backend, device)})" if backend in _HINT else ""
        raise ValueError(f"backend: {op} on {device.type} has no {backend!r}, only {', '.join(names)}{hint}")
    return backend


def reason(op: str, device: torch.device | str, *, dtype: torch.dtype = torch.float32, dimension: int = 128) -> str:
    """Why the default backend is not a faster one."""
    device = torch.device(device)
    chosen = resolve(op, device, dtype=dtype, dimension=dimension)
    if device.type not in _FASTEST[op]:
        return f"there is no faster one for {device.type}"
    faster = _FASTEST[op][device.type]
    passed = [
        f"not {name}: {_INPUTS[op, name] if runs(name, device) else _hint(name, device)}"
        for name in faster[: faster.index(chosen)]
    ]
    return "; ".join(passed) or "the fastest there is for it"


def runs(backend: str, device: torch.device) -> bool:
    """Whether a backend is installed, with what it needs to run on this device."""
    return backend in INSTALLED and not (backend == "triton" and device.type == "cuda" and triton_lacks())


def _hint(backend: str, device: torch.device) -> str:
    if backend == "triton" and backend in INSTALLED and device.type == "cuda" and triton_lacks():
        return f"on a GPU Triton needs {triton_lacks()}"
    return _HINT[backend]


def _is_default(op: str, backend: str, device: torch.device, dtype: torch.dtype, dimension: int) -> bool:
    """Whether an installed backend is one to take by default for these inputs."""
    if op != "info_nce" or backend not in ("triton", "cuda"):
        return True
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
    if backend == "triton":
        fits = capability >= (8, 0) and dtype != torch.float64
    else:
        fits = capability >= (7, 5) and dtype == torch.float16
    return fits and dimension <= _FUSED_DIMENSION


def support_table() -> str:
    """Table of every op's backends by device type, fastest first: the default, and which others are installed."""
    chosen = backends()
    lines = [("op", "device", "backend", "installed", "default for")]
    for op, table in _FASTEST.items():
        for device, names in table.items():
            for name in names:
                there = runs(name, torch.device(device))
                status = "default" if name == chosen[op][device] else "yes" if there else "no"
                inputs = _INPUTS.get((op, name), "any input") if device == "cuda" else "any input"
                lines.append((op, device, name, status, inputs))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)
