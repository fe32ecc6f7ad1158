"""Instructions of the augmentation's kernels for each pixel, from their machine code, compiled without a GPU.

    python -m bench.compile.instructions [--json FILE]

A thread's branches depend on what its view has drawn, so kernels are compiled for a view with all colour ops: one blend
before the hue, the contrast and the saturation after it. Other branches are counted as taken: gray and solarise too.
Images are float16, and as large as the views. The gather counts pixels of a crop, which it upscales by at most 1.5.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from copgen_fast.kernels.color import Jitter

from bench.compile.kernels import compiling, make_main
from copgen_fast.kernels import augment, augment_backward

TARGETS = (75, 90)
RESULTS = Path(__file__).parents[1] / "results" / "instructions.json"
# Rounds of a program's loop over the strips that a row of the crop is in, and of that over a strip's columns.
TAPS = (1.5, 3)


@triton.jit
def jitter_of_all_ops(drawn, view, COMPUTE: tl.constexpr):  # noqa: ANN001, ANN201
    """What load_jitter returns of a view with all ops, in one order; factors stay unknown to the compiler."""
    factors = drawn.factors + 4 * view
    first = tl.maximum(tl.load(factors), 1.1)
    contrast = tl.maximum(tl.load(factors + 1), 1.1)
    saturation = tl.maximum(tl.load(factors + 2), 1.1)
    shift = tl.load(factors + 3)
    to_gray = (0.0, 0.0, 1 - saturation)
    places = (shift, shift + 2, shift - 2)
    return Jitter(True, (first, contrast, saturation), to_gray, 1, 1, 1 - contrast, True, places), True


def executed(sass: str, trips: Sequence[float]) -> float:
    """Instructions that a thread executes, by its machine code.

    Args:
        sass: what the disassembler prints of a kernel.
        trips: how often each of the longest loops runs; others count once.
    """
    labels, instructions, loops = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and found[1].strip() != "NOP":
            instructions.append(found[1])
    for i, text in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", text)
        if target and labels[target[1]] < i:
            loops.append((labels[target[1]], i))
    loops.sort(key=lambda loop: loop[0] - loop[1])
    times = [1.0] * len(instructions)
    for (start, end), count in zip(loops, trips, strict=False):
        times[start : end + 1] = [count * x for x in times[start : end + 1]]
    return sum(times)


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that Triton brings."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def count(target: int) -> list[dict[str, Any]]:
    """Rows of the kernels for one target, in a process that has compiled none of them for another purpose."""
    examples = dict(augment.examples(True))
    with (
        mock.patch.object(augment, "load_jitter", jitter_of_all_ops),
        mock.patch.object(augment_backward, "load_jitter", jitter_of_all_ops),
        compiling(target) as made,
    ):
        for name in ("float16 128 to 128", "float16 128 to 128 exact"):
            examples[name]()
    rows = []
    for kernel, compiled, _ in made:
        given = {name[0]: value for name, value in compiled.src.constants.items()}
        names = {name: given.get(i) for i, name in enumerate(compiled.src.fn.arg_names)}
        pixels = names["ROWS"] * names["STRIPS"] * names["COLUMNS"] / (32 * compiled.metadata.num_warps)
        trips = (1, *TAPS) if kernel == "gather_kernel" else (names["ROWS"],)
        each = executed(disassemble(compiled.asm["cubin"]), trips) / pixels
        rows.append({"kernel": kernel, "target": f"sm_{target}", "per_pixel": round(each, 1)})
    return rows


def measure() -> dict[str, Any]:
    """{"versions": ..., "rows": [...]} of all kernels and targets."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [row for rows in pool.map(count, TARGETS) for row in rows]
    return {"versions": {"triton": version("triton")}, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """The counts as lines of text: target, instructions a pixel, kernel."""
    return "\n".join(f"{row['target']}  {row['per_pixel']:6.1f}  {row['kernel']}" for row in rows)


main = make_main("bench.compile.instructions", __doc__, RESULTS, measure, table)

if __name__ == "__main__":
    sys.exit(main())
