"""Where a file of results was measured: machine, versions, commit, and how busy others kept the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from copgen_fast import __version__
from copgen_fast.runtime.machine import cores, driver, processor, version

_PACKAGES = ("torch", "torchvision", "kornia", "triton", "pillow", "simplejpeg", "nvidia-dali-cuda130")
_STEAL = 7  # user, nice, system, idle, iowait, irq, softirq, steal; guests' times are in user and nice


def machine(device: torch.device) -> dict:
    """The processor, its load as the run starts, and the GPU if `device` is one."""
    found = {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": load(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    return found


def load() -> float:
    """The load average of the last minute: threads that run or wait for a core, the measurement's own included."""
    return round(os.getloadavg()[0], 2)


class Disturbance:
    """Load and stolen time since this was made: what was measured meanwhile is as noisy as these are large."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._start = self._times()

    def read(self) -> dict[str, float | None]:
        """`load_end`, and `steal`: the share of all cores' time that a hypervisor kept; None where unknown."""
        spent = [now - before for now, before in zip(self._times(), self._start, strict=True)]
        steal = round(spent[_STEAL] / sum(spent), 4) if sum(spent) else None
        return {"load_end": load(), "steal": steal}

    def _times(self) -> list[int]:
        """Ticks of all cores by kind, as in /proc/stat; [] where there is none."""
        if not self._stat.is_file():
            return []
        return [int(ticks) for ticks in self._stat.read_text().split("\n", 1)[0].split()[1 : _STEAL + 2]]


def device_name(device: torch.device) -> str:
    """`cpu`, or the card's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that are compared; None for one that is missing."""
    own = {"copgen_fast": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The commit checked out, with `+dirty` where files differ from it; None outside a repository."""
    head = _git("rev-parse", "HEAD")
    return None if head is None else head + ("+dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
