"""Registers, shared memory and spills of every Triton kernel on every GPU generation, compiled without a GPU.

    python -m bench.compile.kernels [--json FILE]

A module in kernels/ that launches kernels has `examples(thorough)`: named launches on meta tensors. They run here with
a driver that only compiles, so that what is measured is what a launch would compile. sm_75, which has the fewest
registers per thread, gets most variants, the others a few.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import make_dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from copgen_fast.errors import Main, command
from copgen_fast.options import parse
from copgen_fast.runtime import artifacts

TARGETS = (75, 80, 86, 89, 90, 120)
RESULTS = Path(__file__).parents[1] / "results" / "kernels.json"
_KERNELS = Path(__file__).parents[2] / "kernels"
REPORT = {  # patterns in the assembler's report, by the field of a row
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "spill_stores_bytes": r"(\d+) bytes spill stores",
    "spill_loads_bytes": r"(\d+) bytes spill loads",
    "stack_bytes": r"(\d+) bytes stack frame",
}


def compile_all(targets: tuple[int, ...] = TARGETS, cache: Path | None = None) -> dict[str, Any]:
    """Compile for each of `targets` in two processes; {"versions": ..., "rows": [...]}, sorted.

    `cache`: a folder to keep as Triton's cache, with the compiler's reports; what it has is not compiled again.
    """
    # No kernel is launched by two files, so that no process finds what another has compiled.
    jobs = [(target, stem) for target in targets for stem in dict(_examples(target))]
    with tempfile.TemporaryDirectory() as folder:
        given = (str(cache or folder),)
        # Forked, they need not import PyTorch anew: nothing here has used a device.
        with ProcessPoolExecutor(2, get_context("fork"), _start, given) as pool:
            rows = [row for rows in pool.map(_compile_file, *zip(*jobs, strict=True)) for row in rows]
    # A kernel that several examples share is compiled by whichever comes first in its process.
    distinct = {(row["target"], row["kernel"], row["options"]): row for row in reversed(rows)}
    rows = sorted(distinct.values(), key=lambda row: (int(row["target"][3:]), row["kernel"], row["variant"]))
    for row in rows:
        del row["options"]
    return {"versions": {name: version(name) for name in ("torch", "triton")}, "rows": rows}


def _examples(target: int) -> list[tuple[str, str]]:
    names = []
    for path in sorted(_KERNELS.glob("*.py")):
        module = importlib.import_module(f"copgen_fast.kernels.{path.stem}")
        if hasattr(module, "examples"):
            names += [(path.stem, name) for name, _ in module.examples(target == TARGETS[0])]
    return names


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile_file(target: int, stem: str) -> list[dict[str, Any]]:
    return [row for file, name in _examples(target) if file == stem for row in _compile(target, stem, name)]


def _compile(target: int, stem: str, name: str) -> list[dict[str, Any]]:
    """Rows of the kernels that one example launches."""
    rows = []
    call = dict(importlib.import_module(f"copgen_fast.kernels.{stem}").examples(target == TARGETS[0]))[name]
    with compiling(target) as made:
        call()
    if any(not report and not _kept(compiled).exists() for _, compiled, report in made):
        with compiling(target, anew=True) as made:  # a launch has compiled it before, and kept no report
            call()
    for kernel, compiled, report in made:
        kept = _kept(compiled)
        if report:
            artifacts.write_bytes(kept, report.encode())
        elif kept.exists():  # compiled before
            report = kept.read_text()
        if report:
            found = {field: re.search(pattern, report) for field, pattern in REPORT.items()}
            numbers = {field: int(match[1]) if match else 0 for field, match in found.items()}
            numbers["shared_bytes"] += compiled.metadata.shared  # dynamic, which ptxas does not see
            row = {"kernel": kernel, "variant": name, "target": f"sm_{target}", **numbers}
            rows.append({**row, "options": compiled.hash})
    return rows


def _kept(compiled: Any) -> Path:
    """The file in Triton's cache that keeps the report of ptxas on a compiled kernel."""
    return Path(os.environ["TRITON_CACHE_DIR"], f"{compiled.hash}.ptxas")


@contextlib.contextmanager
def compiling(target: int, anew: bool = False) -> Iterator[list[tuple[str, Any, str]]]:
    """Within, launches only compile, for `target`: names of kernels, what they became, and the assembler's reports.

    `anew`: also what has been compiled before, whose reports are empty else.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Compiler(CudaDriver):
        """CUDA driver of an absent device, which only compiles; each target is another device number."""

        def __init__(self) -> None:
            self.get_current_device = lambda: target
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target, 32)

    made = []
    run = JITFunction.run

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if anew:
            kernel.device_caches.clear()
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        made.append((kernel.__name__, compiled, log.getvalue()))
        return compiled

    driver.set_active(Compiler())
    JITFunction.run = record
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, anew
            yield made
    finally:
        JITFunction.run = run


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text in columns."""
    header = ["kernel", "variant", "target", *REPORT]
    lines = [header, *([str(row[field]) for field in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def make_main(
    module: str,
    description: str,
    default: Path,
    measure: Callable[[], dict[str, Any]],
    shown: Callable[[list[dict[str, Any]]], str] = table,
) -> Main:
    """Command line of a module of this folder: print the table of {"versions": ..., "rows": [...]}, and write it."""
    described = {"__doc__": description.partition("\n")[0], "__module__": __name__}
    options = make_dataclass("Options", [("json", Path, default)], namespace=described)

    @command
    def main(arguments: list[str] | None = None) -> int:
        file = parse(options, arguments, f"python -m {module}").json
        result = measure()
        print(shown(result["rows"]))
        artifacts.write_bytes(file, (json.dumps(result, indent=1) + "\n").encode())
        return 0

    return main


main = make_main("bench.compile.kernels", __doc__, RESULTS, compile_all)

if __name__ == "__main__":
    sys.exit(main())
