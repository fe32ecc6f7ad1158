"""Measure: python -m bench AREA [--json FILE]. Read results: python -m bench compare|check|report FILES."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import tyro

from bench import gpu, machine
from bench.rows import Options, Row
from bench.view import check, compare, files
from copgen_fast.errors import UsageError, command
from copgen_fast.options import Range, parse
from copgen_fast.runtime import artifacts, devices
from copgen_fast.runtime.machine import processor

COMMAND = "python -m bench"
AREAS = tuple(sorted(path.stem for path in (Path(__file__).parent / "areas").glob("[!_]*.py")))
"""Modules of bench/areas, each with rows(options) -> Iterator[Row]."""
_MANY = 1000  # samples, of which time leaves fewer


@dataclass(frozen=True)
class CheckOptions:
    """Compare results with the targets; exit code 1 where one is missed."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of results (.json) and of tests (.xml, JUnit's)."""

    require: Literal["none", "cpu", "cuda"] = "none"
    """Targets of this device count as missed where they were not measured, or are undecided: the 95 % interval of the
    ratio is on both sides."""

    longer: Annotated[float | None, Range(0, 3600)] = None
    """Measure undecided rows again on this machine, each call for this many seconds, and check them by that."""

    out: Path = Path("runs/bench-longer")
    """Folder for the results of `longer`, which replace those of the same rows where given after them."""


@dataclass(frozen=True)
class ReportOptions:
    """Draw results: one page with tables and plots, and the plots as files."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of results (.json), and of tests (.xml, JUnit's), which are only compared with the targets."""

    out: Path = Path("runs/bench")
    """Folder for report.html and the plots."""


@dataclass(frozen=True)
class GpuOptions:
    """Run all tests and benchmarks that need a GPU, each within its time budget, and compare with the targets."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs/gpu")
    """Folder for results, logs and the report."""

    seconds: Annotated[float, Range(1)] = 540
    """Time for everything."""


@command
def main(arguments: list[str] | None = None) -> int:
    """Run one area or all of them, or another command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    names = (*AREAS, "all")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {COMMAND} AREA [options]")
        for name, (_, usage) in _COMMANDS.items():
            print(f"       {COMMAND} {name} {usage}")
        print(f"\nareas: {', '.join(names)}\n")
        arguments = ["all", "--help"]
    area, *rest = arguments
    if area in _COMMANDS:
        return _COMMANDS[area][0](rest)
    if area not in names:
        raise UsageError(f"unknown area {area!r}: choose from {', '.join((*names, *_COMMANDS))}")
    measure(AREAS if area == "all" else (area,), parse(Options, rest, f"{COMMAND} {area}"))
    return 0


def measure(areas: Sequence[str], options: Options) -> None:
    """Print the rows of these areas as they come, and rewrite the file `options.json` at each.

    Raises:
        UsageError: no such device, thread count or case, or nothing to profile.
    """
    device = devices.resolve(options.device, "fp32")
    devices.make_current(device)  # the one whose streams events are recorded on
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Before measuring, which raises the load.
    record = {"machine": machine.machine(device), "versions": machine.versions(), "commit": machine.commit()}
    disturbance = machine.Disturbance()
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    modules = [importlib.import_module(f"bench.areas.{area}") for area in areas]
    if options.profile is not None:
        return _profile(modules, options)
    print(_HEADER, flush=True)
    rows: list[Row] = []
    for row in (row for module in modules for row in module.rows(options)):
        if not rows or rows[-1].limit != row.limit:
            print(f"limit: {row.limit}")
        print(_line(row), flush=True)
        rows.append(row)
        if options.json is not None:  # at every row, for runs that are interrupted
            record["machine"] |= disturbance.read()
            artifacts.write_json(options.json, record | {"rows": [asdict(row) for row in rows]})
    if not rows:
        raise UsageError(f"--only {options.only!r} leaves no case to measure")
    print("meanwhile: " + ", ".join(f"{name} {value}" for name, value in disturbance.read().items()))


def _profile(modules: Sequence[ModuleType], options: Options) -> None:
    line = None
    for line in (line for module in modules if hasattr(module, "profiles") for line in module.profiles(options)):
        print(line, flush=True)
    if line is None:
        areas = ", ".join(module.__name__.rpartition(".")[2] for module in modules)
        raise UsageError(f"--profile: no training step in {areas} with --only {options.only!r}")


def _compare(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UsageError(f"expected two files: {COMMAND} compare A.json B.json")
    for line in compare.lines(*(Path(name).expanduser() for name in arguments)):
        print(line)
    return 0


def _check(arguments: list[str]) -> int:
    options = parse(CheckOptions, arguments, f"{COMMAND} check")
    found = check.findings(options.files)
    if options.longer is not None:
        found = check.findings((*options.files, *_measured_longer(found, options)))
    print("\n".join(check.lines(found)))
    return 0 if check.met(found, options.require) else 1


def _measured_longer(found: Sequence[check.Finding], options: CheckOptions) -> list[Path]:
    """Files of new measurements of what is undecided.

    Raises:
        UsageError: it was measured on another machine.
    """
    undecided = {(x.row["area"], x.row["case"]): x.row["device"] for x in found if x.verdict == "undecided"}
    for path in files.of_results(options.files) if undecided else ():
        where = (files.content(path).get("machine") or {}).get("cpu")
        if where not in (None, processor()):
            raise UsageError(f"--longer: {path} was measured on {where}, and this is {processor()}: measure there")
    written = []
    for (area, case), where in undecided.items():
        device: Literal["cpu", "cuda"] = "cpu" if where == "cpu" else "cuda"
        path = options.out / f"{area}-{re.sub('[^A-Za-z0-9.=]+', '-', case)}.json"
        measure((area,), Options(path, device, repeats=_MANY, seconds=options.longer, only=case))
        written.append(path)
    return written


def _report(arguments: list[str]) -> int:
    from bench.view import report  # needs matplotlib

    options = parse(ReportOptions, arguments, f"{COMMAND} report")
    for path in report.write(options.files, options.out):
        print(path)
    return 0


def _gpu(arguments: list[str]) -> int:
    options = parse(GpuOptions, arguments, f"{COMMAND} gpu")
    return gpu.main(options.folder, options.seconds)


def _roofline(arguments: list[str]) -> int:
    from bench import roofline  # which builds the stages' networks

    options = parse(roofline.Options, arguments, f"{COMMAND} roofline")
    result = roofline.measure(options.navigator_batch, options.pretrain_batch)
    for step, run in result["runs"].items():
        print(f"{step}, batch {run['batch']}: by arithmetic, confirmed by no card")
        print("\n".join(check.aligned(roofline.table(result, step))))
    if options.json is not None:
        artifacts.write_json(options.json, result)
    return 0


_COMMANDS = {
    "compare": (_compare, "A.json B.json"),
    "check": (_check, "FILE... [--require cpu|cuda] [--longer SECONDS]"),
    "report": (_report, "FILE... [--out FOLDER]"),
    "gpu": (_gpu, "[FOLDER] [--seconds 540]"),
    "roofline": (_roofline, "[--json FILE]"),
}

_HEADER = (
    f"{'case':42} {'direction':16} {'backend':9} {'precision':9} {'ours ms':>9} {'spread':>6} "
    f"{'peer ms':>9} {'ratio':>8} {'95 % interval':>15} {'limit ms':>9} {'of limit':>8} {'peak MB':>8} {'theirs':>8} "
    f"{'n':>3}  peer"
)


def _line(row: Row) -> str:
    peaks = " ".join(f"{'?' if mb is None else f'{mb:.1f}':>8}" for mb in (row.peak_mb, row.peer_peak_mb))
    interval = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
    return (
        f"{row.case:42} {row.direction:16} {row.backend:9} {row.precision:9} {row.ours_ms:9.4g} {row.ours_spread:6.2f} "
        f"{row.peer_ms:9.4g} {row.ratio:7.2f}x {interval:>15} {row.limit_ms:9.4g} {row.of_limit:8.1%} "
        f"{peaks} {row.n:3}  {row.peer}"
    )


if __name__ == "__main__":
    sys.exit(main())
