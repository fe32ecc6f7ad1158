"""Which implementation of an op runs where: the one place that knows."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# What an implementation needs beside torch.
_MODULE = {"cpp": "copgen_fast._cpp", "cuda": "copgen_fast._cuda", "triton": "triton"}
_INSTALLED = {"reference", "chunked", *(name for name, module in _MODULE.items() if find_spec(module) is not None)}
_HINT = {
    "cpp": "the C++ extension is not built: install again where a C++ compiler is, with --no-build-isolation",
    "cuda": "the CUDA extension is not built: install again where nvcc is, with --no-build-isolation",
    "triton": "on a GPU it needs the package triton; on the CPU it runs only under TRITON_INTERPRET=1, slowly",
}

# Per op and device type, fastest first; a device type not listed runs the reference.
_FASTEST: dict[str, dict[str, tuple[str, ...]]] = {
    "augment": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "info_nce": {"cpu": ("cpp", "chunked", "reference"), "cuda": ("triton", "cuda", "chunked", "reference")},
    "l2_normalize": {"cpu": ("reference",), "cuda": ("triton", "reference")},
    "cond_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
}

# What a backend is for, where that is not all its device type's inputs; others run it when they are told to.
_PURPOSE = {
    (
        "info_nce",
        "triton",
    ): "sm_80 and newer, not float64, D up to 512: on sm_75 Triton makes no tensor-core instruction",
    ("info_nce", "cuda"): "sm_75 and newer, float16, D up to 512; rounds other dtypes to float16",
    ("info_nce", "chunked"): "any device; a GPU without a kernel of its own",
}
# Beyond it the fused backward computes similarities again for each part of D: large products are faster.
_FUSED_DIMENSION = 512


def installed() -> set[str]:
    """Names of the backends that this installation has, whatever the device."""
    return set(_INSTALLED)


def backends() -> dict[str, dict[str, str]]:
    """The backend each op takes by default, for float32: {op: {device type: backend}}.

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

    dtype and dimension, the input's, decide for info_nce on a GPU.

    Raises:
        ValueError: `backend` does not exist for this op and device, or is not installed; the message lists
            those that do.
    """
    device = torch.device(device)
    names = [name for name in _FASTEST[op].get(device.type, ("reference",)) if name in _INSTALLED]
    if backend is None:
        return next(name for name in names if _suits(op, name, device, dtype, dimension))
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and "triton" in _INSTALLED
    if interpreted and "triton" in _FASTEST[op]["cuda"]:
        names.append("triton")
    if backend not in names:
        hint = f" ({_HINT[backend]})" if backend in _HINT else ""
        raise ValueError(f"backend: {op} on {device.type} has no {backend!r}, only {', '.join(names)}{hint}")
    return backend


def reason(op: str, device: torch.device | str, *, dtype: torch.dtype = torch.float32, dimension: int = 128) -> str:
    """Why `resolve` takes the backend that it takes unasked: what is wrong with those that would be faster."""
    device = torch.device(device)
    chosen = resolve(op, device, dtype=dtype, dimension=dimension)
    if device.type not in _FASTEST[op]:
        return f"there is no faster one for {device.type}"
    faster = _FASTEST[op][device.type]
    passed = [
        f"not {name}: {_PURPOSE[op, name] if name in _INSTALLED else _HINT[name]}"
        for name in faster[: faster.index(chosen)]
    ]
    return "; ".join(passed) or "the fastest there is for it"


def _suits(op: str, backend: str, device: torch.device, dtype: torch.dtype, dimension: int) -> bool:
    """Whether a backend that can run it should, unasked."""
    if op != "info_nce" or backend not in ("triton", "cuda"):
        return True
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
    if backend == "triton":
        fits = capability >= (8, 0) and dtype != torch.float64
    else:
        fits = capability >= (7, 5) and dtype == torch.float16
    return fits and dimension <= _FUSED_DIMENSION


def support_table() -> str:
    """Every op's backends by device type, fastest first: which are here, and which is taken unasked."""
    chosen = backends()
    lines = [("op", "device", "backend", "here", "for")]
    for op, table in _FASTEST.items():
        for device, names in table.items():
            for name in names:
                here = "default" if name == chosen[op][device] else "yes" if name in _INSTALLED else "no"
                purpose = _PURPOSE.get((op, name), "any input") if device == "cuda" else "any input"
                lines.append((op, device, name, here, purpose))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)
