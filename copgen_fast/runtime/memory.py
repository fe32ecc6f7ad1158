"""Peak memory of a call, and available memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> float | None:
    """Peak memory of one warm call above what was allocated before, in 10^6 bytes.

    On a GPU by PyTorch's allocator. On the CPU by the kernel: free heap pages are returned to it (else the call would
    reuse them unseen), the process's peak resident size is reset, and its rise is read after the call. So scratch
    memory of C++ code counts like tensors; what was allocated but never touched does not. Exact to about 0.3 MB; None
    where the kernel is not Linux.
    """
    with no_garbage_collection():
        return _gpu_peak(call, device) if torch.device(device).type == "cuda" else _cpu_peak(call)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Garbage collection is off in this context."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def available_memory(device: torch.device) -> float | None:
    """Memory that can still be allocated, in 10^6 bytes: on a GPU with what PyTorch has cached, on the CPU within the
    limits of control groups and of `ulimit -v`. None where unknown.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) / 1e6
    if not _MEMINFO.exists():
        return None
    free = [_bytes(_MEMINFO, "MemAvailable"), *_cgroup_free()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _bytes(_STATUS, "VmSize"))
    return max(0, min(free)) / 1e6


def _cgroup_free() -> Iterator[int]:
    """What the limit of each control group (version 2) around this process leaves, with files that it caches."""
    own = re.search(r"^0::/(.*)$", _CGROUP.read_text(), re.MULTILINE) if _CGROUP.exists() else None
    folder = _CGROUPS / (own[1] if own else "")
    for group in (folder, *folder.parents):
        if group.is_relative_to(_CGROUPS) and (group / "memory.max").exists():
            limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            if limit.strip() != "max":
                yield int(limit) - used + int(cached[1] if cached else 0)


def _gpu_peak(call: Callable[[], object], device: torch.device | str) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _cpu_peak(call: Callable[[], object]) -> float | None:
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        return None
    with contextlib.suppress(AttributeError):  # musl has no malloc_trim, and keeps few free pages
        ctypes.CDLL(None).malloc_trim(0)
    mark.write_text("5")
    before = _bytes(_STATUS, "VmRSS")
    call()
    return max(0, _bytes(_STATUS, "VmHWM") - before) / 1e6


def _bytes(file: Path, field: str) -> int:
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    return int(kilobytes[1]) * 1024
