"""Registers, shared memory, spills and tensor-core instructions of every CUDA C++ kernel, compiled without a GPU.

    python -m bench.compile.cuda_kernels [--json FILE]

The rows are those of bench.compile.kernels, and `hmma`: tensor-core instructions in the machine code, or null
where no disassembler is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.compile.kernels import REPORT, make_main

TARGETS = (75, 80)
RESULTS = Path(__file__).parents[1] / "results" / "cuda_kernels.json"
SOURCES = Path(__file__).parents[2] / "csrc"
_TEMPLATE = {  # names of a kernel's flags, in order: (where true, where false)
    "row_losses_kernel": (("bounded", "any logits"), ("nearest", "")),
    "row_gradients_kernel": (("bounded", "any logits"),),
}
_SHAPES = {"ILi4ELi1ELi8EE": "wide", "ILi1ELi8ELi2EE": "thin"}


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: on PATH, or in a package of this Python."""
    if (found := shutil.which(name)) is not None:
        return found
    roots = [find_spec(package) for package in ("nvidia", "triton")]
    folders = [Path(folder) for spec in roots if spec for folder in spec.submodule_search_locations or ()]
    return next((str(path) for folder in folders for path in sorted(folder.glob(f"**/bin/{name}"))), None)


def compile_for(target: int) -> dict[str, Any]:
    """{"ptx": text, "rows": [...]} of all kernels of csrc/*/*.cu for one target."""
    rows, texts = [], []
    for source in sorted(SOURCES.glob("*/*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
            _nvcc("-ptx", f"-arch=compute_{target}", "-std=c++17", "-O3", str(source), "-o", str(ptx))
            report = _nvcc("-cubin", f"-arch=sm_{target}", "-Xptxas=-v", str(ptx), "-o", str(cubin))
            hmma = _hmma(cubin)
            texts.append(ptx.read_text())
        for name, text in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?)(?=Compiling|\Z)", report, re.DOTALL):
            found = {field: re.search(pattern, text) for field, pattern in REPORT.items()}
            numbers = {field: int(match[1]) if match else 0 for field, match in found.items()}
            kernel, variant = _names(name)
            count = None if hmma is None else hmma.get(name, 0)
            rows.append({"kernel": kernel, "variant": variant, "target": f"sm_{target}", **numbers, "hmma": count})
    return {"ptx": "\n".join(texts), "rows": sorted(rows, key=lambda row: (row["kernel"], row["variant"]))}


def compile_all(targets: tuple[int, ...] = TARGETS) -> dict[int, dict[str, Any]]:
    """compile_for each of `targets`, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(compile_for, targets), strict=True))


def _nvcc(*arguments: str) -> str:
    """Output of nvcc."""
    done = subprocess.run([tool("nvcc") or "nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def _hmma(cubin: Path) -> dict[str, int] | None:
    """Tensor-core instructions per kernel, or None without a disassembler."""
    if (program := tool("cuobjdump")) is None:
        return None
    text = subprocess.run([program, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)", text)[1:]
    return {name: code.count("HMMA.") for name, code in zip(functions[::2], functions[1::2], strict=True)}


def _names(mangled: str) -> tuple[str, str]:
    """Kernel and variant of a mangled name."""
    kernel = re.match(r"_ZN6copgen\d+([a-z_]+?_kernel)", mangled)[1]
    shape = re.search(r"5Shape(ILi\d+ELi\d+ELi\d+EE)", mangled)
    flags = re.findall(r"Lb([01])E", mangled)
    words = [words[flag == "0"] for words, flag in zip(_TEMPLATE.get(kernel, ()), flags, strict=True)]
    return kernel, " ".join(filter(None, [_SHAPES[shape[1]] if shape else "", *words]))


def measure() -> dict[str, Any]:
    """{"versions": ..., "rows": [...]} of all kernels and targets."""
    rows = [row for compiled in compile_all().values() for row in compiled["rows"]]
    version = re.search(r"V([\d.]+)", _nvcc("--version"))[1]  # as 13.0.88
    return {"versions": {"nvcc": version}, "rows": rows}


main = make_main("bench.compile.cuda_kernels", __doc__, RESULTS, measure)

if __name__ == "__main__":
    sys.exit(main())
