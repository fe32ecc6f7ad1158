"""All tests and benchmarks that need a GPU, in nine minutes on one card, the most important first.

The folder gets tests-*.xml, *-gpu.json, a log of each part, and the report with its plots. Each part has a time budget
and is interrupted when that ends; what it has written by then counts. A part that fails stops no other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.view import check
from copgen_fast.errors import UsageError

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

    def tests(name: str, seconds: float, *arguments: str) -> Part:
        xml = str(folder / f"tests-{name}.xml")
        pytest = ("-m", "pytest", "-n", "4", "--dist", "loadfile", "--junitxml", xml)
        return Part(f"tests-{name}", seconds, (*pytest, *(f"tests/{argument}" for argument in arguments)))

    def measure(area: str, seconds: float, only: str = "", name: str = "", required: bool = True) -> Part:
        name = name or area
        options = ("--device", "cuda", "--repeats", "10", "--json", str(folder / f"{name}-gpu.json"), "--only", only)
        return Part(name, seconds, ("-m", "bench", area, *options), required)

    return [
        tests(
            "kernels",
            100,
            "ops/test_info_nce_gpu.py",
            "ops/test_cond_norm.py",
            "csrc/test_info_nce_cuda.py",
            *(f"kernels/test_{name}.py" for name in ("info_nce", "augment", "cond_norm", "epilogue")),
        ),
        measure("navigator", 140, "bigbigan"),
        measure("pretrain", 60, "resnet50"),
        measure("augment", 55, "simclr B=352"),
        measure("info_nce", 40, "N=16384"),
        measure("generator", 55, "bigbigan B=256"),
        tests(
            "stages",
            45,
            "training/test_cuda_graph.py",
            "stages/test_navigator.py",
            "stages/test_pretrain.py",
            "pairs/test_online.py",
            "pairs/read/test_dali.py",
            "pairs/write/test_pinned.py",
            "generators/test_bigbigan.py",
            "generators/test_biggan_deep.py",
        ),
        measure("loader", 20, "png"),
        measure("info_nce", 30, "D=128", "info_nce-rest", required=False),
        measure("cond_norm", 20, required=False),
        measure("convolutions", 20, required=False),
        measure("augment", 20, "B=64", "augment-rest", required=False),
    ]


def main(folder: Path, seconds: float) -> int:
    """Run all parts and print the table of targets; 0 where required parts ended well and all targets are met."""
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
