"""Facts about the machine: its processor, its GPU driver, installed packages."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path


def processor() -> str:
    """The processor's model."""
    return _first(r"model name\s*: (.+)", Path("/proc/cpuinfo")) or platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    return _first(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version"))


def version(package: str) -> str | None:
    """Version of an installed package; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first(pattern: str, path: Path) -> str | None:
    match = re.search(pattern, path.read_text()) if path.exists() else None
    return match[1].strip() if match else None
