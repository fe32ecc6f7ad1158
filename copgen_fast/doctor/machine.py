"""Hardware and software of this machine that copgen_fast can use."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

from copgen_fast import __version__
from copgen_fast.images import jpeg
from copgen_fast.ops.backend import triton_lacks
from copgen_fast.runtime import machine
from copgen_fast.runtime.memory import available_memory


@dataclass(frozen=True)
class Fact:
    """A component: its version or description (`found`) or, where that is None, how to get it (`remedy`)."""

    name: str
    found: str | None
    remedy: str = ""

    def __str__(self) -> str:
        return self.found if self.found is not None else f"missing: {self.remedy}"


def facts(device: torch.device) -> Iterator[Fact]:
    """Facts about the machine, its software and the memory of `device`."""
    yield Fact("copgen_fast", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield Fact("processor", _processor())
    yield Fact("memory", _memory(device))
    yield from _gpus()
    yield Fact("PyTorch", f"{torch.__version__}, {_built_for()}")
    yield Fact("Triton", machine.version("triton"), "pip install triton (fused ops on GPUs)")
    lacking = triton_lacks()
    yield Fact("Triton's launcher", None if lacking else "can be compiled", f"on a GPU Triton needs {lacking}")
    yield Fact("C++ compiler", _tool(os.environ.get("CXX", "c++")), "set CXX (builds the CPU's fused ops)")
    nvcc = os.environ.get("CUDA_HOME", "")
    yield Fact("nvcc", _tool(f"{nvcc}/bin/nvcc" if nvcc else "nvcc"), "set CUDA_HOME (builds InfoNCE for Turing)")
    for name, use in (("_cpp", "a C++ compiler"), ("_cuda", "nvcc")):
        here = find_spec(f"copgen_fast.{name}") is not None
        remedy = f"install again with --no-build-isolation where {use} is"
        yield Fact(f"extension {name}", "built" if here else None, remedy)
    yield Fact("DALI", _dali(), "pip install copgen_fast[dali] (decodes pairs that memory does not hold)")
    yield from _codecs()


def _processor() -> str:
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{machine.processor()}, {machine.cores()} cores, {threads} threads, {instructions}"


def _memory(device: torch.device) -> str:
    texts = []
    for place in dict.fromkeys((torch.device("cpu"), device)):
        available = available_memory(place)
        texts.append(f"{place}: {'unknown' if available is None else f'{available / 1e3:.1f} GB'} available")
    return ", ".join(texts)


def _gpus() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        yield Fact("GPU", "none that PyTorch can use")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.1f} GB"
        yield Fact(f"GPU {index}", f"{name}, {gpu.multi_processor_count} multiprocessors")
    yield Fact("driver", machine.driver() or "unknown")


def _built_for() -> str:
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU alone"


def _dali() -> str | None:
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-dali-cuda"):
            return f"{name} {distribution.version}"
    return None


def _codecs() -> Iterator[Fact]:
    from PIL import Image, features

    turbo = features.version("libjpeg_turbo")
    libraries = {
        "PNG": ("zlib", f"zlib {features.version('zlib')}"),
        "JPEG": ("jpg", f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}, not turbo: slower"),
    }
    for codec, (feature, library) in libraries.items():
        found = f"Pillow {Image.__version__}, {library}" if features.check(feature) else None
        yield Fact(codec, found, "a Pillow that is built with it")
    found = machine.version("simplejpeg")
    if found and not jpeg.available():
        found += ", not used: its pixels differ from Pillow's"
    yield Fact("simplejpeg", found, "pip install copgen_fast[jpeg] (decodes JPEG files 1.5 times as fast)")


def _tool(command: str) -> str | None:
    """Path and version of a compiler, from the line of `--version` that has one."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"{path} (does not start)"
    lines = [line.strip() for line in said.splitlines() if re.search(r"\d+\.\d+", line)]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{path} ({release})" if release else path
