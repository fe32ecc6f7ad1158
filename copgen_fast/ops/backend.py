"""Which implementation of an op runs where: the one place that knows."""

from __future__ import annotations

import torch

# Per op and device type, fastest first; a device type not listed runs the reference.
_AVAILABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "augment": {"cpu": ("reference",), "cuda": ("reference",)},
    "info_nce": {"cpu": ("reference",), "cuda": ("reference",)},
}


def backends() -> dict[str, dict[str, str]]:
    """The backend each op takes by default: {op: {device type: backend}}."""
    return {op: {device: names[0] for device, names in table.items()} for op, table in _AVAILABLE.items()}


def resolve(op: str, device: torch.device | str, backend: str | None = None) -> str:
    """Name of the backend that runs `op` on `device`: `backend` itself, or the fastest for None.

    Raises:
        ValueError: `backend` does not exist for this op and device; the message lists those that do.
    """
    kind = torch.device(device).type
    names = _AVAILABLE[op].get(kind, ("reference",))
    if backend is None:
        return names[0]
    if backend not in names:
        raise ValueError(f"backend: {op} on {kind} has no {backend!r}, only {', '.join(names)}")
    return backend
