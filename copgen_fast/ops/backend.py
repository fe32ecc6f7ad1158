"""Which implementation of an op runs where: the one place that knows."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# What an implementation needs beside torch.
_MODULE = {"cpp": "copgen_fast._cpp", "triton": "triton"}
_INSTALLED = {"reference", *(name for name, module in _MODULE.items() if find_spec(module) is not None)}
_HINT = {
    "cpp": "the C++ extension is not built: install again where a C++ compiler is, with --no-build-isolation",
    "triton": "on a GPU it needs the package triton; on the CPU it runs only under TRITON_INTERPRET=1, slowly",
}

# Per op and device type, fastest first; a device type not listed runs the reference.
_FASTEST: dict[str, dict[str, tuple[str, ...]]] = {
    "augment": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "info_nce": {"cpu": ("reference",), "cuda": ("reference",)},
}


def installed() -> set[str]:
    """Names of the backends that this installation has, whatever the device."""
    return set(_INSTALLED)


def backends() -> dict[str, dict[str, str]]:
    """The backend each op takes by default: {op: {device type: backend}}."""
    return {op: {device: resolve(op, device) for device in table} for op, table in _FASTEST.items()}


def resolve(op: str, device: torch.device | str, backend: str | None = None) -> str:
    """Name of the backend that runs `op` on `device`: `backend` itself, or the fastest for None.

    Raises:
        ValueError: `backend` does not exist for this op and device, or is not installed; the message lists
            those that do.
    """
    kind = torch.device(device).type
    names = [name for name in _FASTEST[op].get(kind, ("reference",)) if name in _INSTALLED]
    if backend is None:
        return names[0]
    interpreted = kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and "triton" in _INSTALLED
    if interpreted and "triton" in _FASTEST[op]["cuda"]:
        names.append("triton")
    if backend not in names:
        hint = f" ({_HINT[backend]})" if backend in _HINT else ""
        raise ValueError(f"backend: {op} on {kind} has no {backend!r}, only {', '.join(names)}{hint}")
    return backend
