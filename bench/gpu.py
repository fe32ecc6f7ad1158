"""All tests and benchmarks that need a GPU, in nine minutes on one card, the most important first.

What is missing for them is listed first, a line each; without a GPU or the test runner nothing is started. The folder
gets tests-*.xml, *-gpu.json, a log of each part, and the report with its plots. Each part has a time budget and is
interrupted when that ends; what it has written by then counts. A part that fails stops no other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.view import check
from copgen_fast.errors import UsageError
from copgen_fast.ops.backend import INSTALLED, triton_lacks
from copgen_fast.runtime.machine import cores

ROOT = Path(__file__).parents[1]
_SUMMARY_SECONDS = 15
INTERRUPT_SECONDS = 8
_TAIL = 25


@dataclass(frozen=True)
class Part:
    """Arguments of a Python interpreter and their time budget; only a `required` part decides the exit code."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    required: bool = True


def parts(folder: Path) -> list[Part]:
    """Tests and benchmarks in the order in which they run, writing their results to the folder."""

    def tests(name: str, seconds: float, *arguments: str, only: str = "") -> Part:
        xml = str(folder / f"tests-{name}.xml")
        pytest = ("-m", "pytest", "-n", str(min(12, max(4, cores()))), "--junitxml", xml)  # compiling takes cores
        pytest += ("-k", only) if only else ()
        return Part(f"tests-{name}", seconds, (*pytest, *(f"tests/{argument}" for argument in arguments)))

    def measure(area: str, seconds: float, only: str = "", name: str = "", required: bool = True) -> Part:
        name = name or area
        options = ("--device", "cuda", "--repeats", "9", "--seconds", "0.4", "--only", only)
        options += ("--json", str(folder / f"{name}-gpu.json"))
        return Part(name, seconds, ("-m", "bench", area, *options), required)

    # Results that are wrong first, then slow ones; budgets by times on an H100 fill nine minutes with the summary.
    return [
        tests("graphs", 30, "training/test_cuda_graph.py"),
        tests(
            "kernels",
            60,
            "ops/test_info_nce_gpu.py",
            "ops/test_cond_norm.py",
            "ops/test_add_upsampled.py",
            *(f"kernels/test_{name}.py" for name in ("info_nce", "augment", "cond_norm", "add_upsampled", "epilogue")),
        ),
        # The others emulate its kernels on the CPU.
        tests("cuda", 30, "csrc/test_info_nce_cuda.py", only="gpu"),
        tests(
            "stages",
            40,
            "stages/test_navigator.py",
            "stages/test_pretrain.py",
            "pairs/test_online.py",
            "pairs/read/test_dali.py",
            "pairs/write/test_pinned.py",
            "generators/test_bigbigan.py",
            "generators/test_biggan_deep.py",
        ),
        measure("generator", 35, "bigbigan B=256 128px half"),
        measure("augment", 55, "simclr B=352"),
        measure("info_nce", 40, "N=16384"),
        measure("navigator", 75, "bigbigan B=176"),
        measure("pretrain", 70, "resnet50 B=224 128px"),
        measure("online", 20, "resnet18/64"),
        measure("loader", 15, "png"),
        measure("info_nce", 15, "N=224", "info_nce-small", required=False),
        measure("add_upsampled", 10, "B=256", required=False),
        measure("cond_norm", 15, "B=256", required=False),
        measure("convolutions", 15, "B=256", required=False),
    ]


def missing() -> tuple[list[str], list[str]]:
    """What this machine lacks, and how to get it: what keeps all parts from running, and what some of them need."""
    tools = [name for name in ("pytest", "xdist", "hypothesis", "torchvision") if find_spec(name) is None]
    all_need = [f"{name}: pip install 'copgen_fast[dev]'" for name in tools]
    if not torch.cuda.is_available():
        all_need.append(f"a GPU that PyTorch {torch.__version__} can use: see nvidia-smi, and install a CUDA build")
    some_need = [f"for Triton's kernels, {lacking}"] if (lacking := triton_lacks()) else []
    if find_spec("triton") is None:
        some_need.append("for Triton's kernels, the package: pip install triton")
    if "cuda" not in INSTALLED:
        nvcc = "nvcc is there" if shutil.which("nvcc") else "there is no nvcc on PATH, nor in CUDA_HOME"
        some_need.append(f"for InfoNCE on Turing, the CUDA extension ({nvcc}): install with --no-build-isolation")
    if find_spec("nvidia.dali") is None:
        some_need.append("for the DALI loader, the package: pip install 'copgen_fast[dali]'")
    return all_need, some_need


def main(folder: Path, seconds: float) -> int:
    """Run all parts and print the table of targets; 0 where required parts ended well and all targets are met."""
    all_need, some_need = missing()
    for line in (*all_need, *some_need):
        print(f"missing: {line}", flush=True)
    if all_need:
        return 2
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in results(folder):
        old.unlink()
    return summary(folder, run(parts(folder), folder, seconds - _SUMMARY_SECONDS))


def run(todo: Sequence[Part], folder: Path, seconds: float) -> list[Part]:
    """Run parts one after the other within `seconds` in all; returns those that failed or were cut off."""
    end = time.monotonic() + seconds
    unfinished = []
    for part in todo:
        budget = min(part.seconds, end - time.monotonic())
        print(f"== {part.name}, at most {max(budget, 0):.0f} s", flush=True)
        failure = "no time is left" if budget < 2 else _run(part, budget, folder / f"{part.name}.log")
        if failure:
            print(f"{part.name}: {failure}", flush=True)
            unfinished.append(part)
    return unfinished


def results(folder: Path) -> tuple[Path, ...]:
    """Files of results and of tests that the parts wrote."""
    return (*sorted(folder.glob("*-gpu.json")), *sorted(folder.glob("tests-*.xml")))


def summary(folder: Path, unfinished: Sequence[Part]) -> int:
    """Print the table of targets and write the report; the exit code."""
    files = results(folder)
    if not files:
        print("nothing was measured")
        return 1
    found = check.findings(files)
    print("\n".join(["== targets", *check.lines(found)]))
    try:
        from bench.view import report

        report.write(files, folder)
    except (ImportError, UsageError) as error:
        print(f"no report: {error}")
    if unfinished:
        print(f"failed or cut off: {', '.join(part.name for part in unfinished)}")
    return 0 if check.met(found, "cuda") and not any(part.required for part in unfinished) else 1


def _run(part: Part, seconds: float, log: Path) -> str | None:
    """Run one part; returns how it failed, or None."""
    command = [sys.executable, *part.arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(seconds)
            failure = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"out of time after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: pytest then still writes its report
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:]), flush=True)
    return failure
