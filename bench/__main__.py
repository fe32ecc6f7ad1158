"""Measure: python -m bench AREA [--json FILE]. Read what was measured: python -m bench compare|check|report FILES."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bench import machine
from bench.harness import Row
from bench.options import Options
from bench.view import check, compare, report
from copgen_fast import errors
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import artifacts, devices

COMMAND = "python -m bench"
# A module of this folder each, with rows(options) -> Iterator[Row].
AREAS = (
    "augment",
    "info_nce",
    "cond_norm",
    "convolutions",
    "codecs",
    "generator",
    "loader",
    "navigator",
    "pretrain",
)


@dataclass(frozen=True)
class CheckOptions:
    """Compare results with the numbers that the issues ask for; exit code 1 where one is missed."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of results (.json) and of tests (.xml, JUnit's)."""

    require: Literal["none", "cpu", "cuda"] = "none"
    """What was not measured counts as missed on this device."""


@dataclass(frozen=True)
class ReportOptions:
    """Draw results: one page with tables and plots, and the plots as files."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of results (.json), and of tests (.xml, JUnit's), which are judged only."""

    out: Path = Path("runs/bench")
    """Folder for report.html and the plots."""


def main(arguments: list[str] | None = None) -> int:
    """Run an area or all of them, or read files of results; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: {COMMAND} AREA [options]")
            for name, what in _READERS.items():
                print(f"       {COMMAND} {name} {what[1]}")
            print(f"\nareas: {', '.join((*AREAS, 'all'))}\n")
            arguments = ["all", "--help"]
        area, *rest = arguments
        if area in _READERS:
            return _READERS[area][0](rest)
        if area not in (*AREAS, "all"):
            raise UsageError(f"unknown area {area!r}: choose from {', '.join((*AREAS, 'all', *_READERS))}")
        measure(AREAS if area == "all" else (area,), tyro.cli(Options, prog=f"{COMMAND} {area}", args=rest))
    except CopgenError as error:
        return errors.report(error)
    return 0


def measure(areas: tuple[str, ...], options: Options) -> None:
    """Print the rows of these areas as they come, and keep `options.json` up to date with them.

    Raises:
        UsageError: no such device, thread count or case, or nothing to profile.
    """
    device = devices.resolve(options.device, "fp32")
    devices.make_current(device)  # the one whose streams events are recorded on
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Before the measurements: they are what loads the machine afterwards.
    record = {"machine": machine.machine(device), "versions": machine.versions(), "commit": machine.commit()}
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    if options.profile is not None:
        return _profile(areas, options)
    print(_HEADER, flush=True)
    rows: list[Row] = []
    for area in areas:
        for row in importlib.import_module(f"bench.areas.{area}").rows(options):
            if not rows or rows[-1].limit != row.limit:
                print(f"limit: {row.limit}")
            print(_line(row), flush=True)
            rows.append(row)
            if options.json is not None:  # at every row: a run that is cut short leaves what it has
                artifacts.write_json(options.json, record | {"rows": [asdict(row) for row in rows]})
    if not rows:
        raise UsageError(f"--only {options.only!r} leaves no case to measure")


def _profile(areas: tuple[str, ...], options: Options) -> None:
    modules = [importlib.import_module(f"bench.areas.{area}") for area in areas]
    able = [module for module in modules if hasattr(module, "profiles")]
    printed = 0
    for module in able:
        for line in module.profiles(options):
            print(line, flush=True)
            printed += 1
    if not printed:
        raise UsageError(f"--profile: no training step in {', '.join(areas)} with --only {options.only!r}")


def _compare(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UsageError(f"expected two files: {COMMAND} compare A.json B.json")
    for line in compare.lines(*map(Path, arguments)):
        print(line)
    return 0


def _check(arguments: list[str]) -> int:
    options = tyro.cli(CheckOptions, prog=f"{COMMAND} check", args=arguments)
    found = check.findings(options.files)
    print("\n".join(check.lines(found)))
    return 0 if check.met(found, options.require) else 1


def _report(arguments: list[str]) -> int:
    options = tyro.cli(ReportOptions, prog=f"{COMMAND} report", args=arguments)
    for path in report.write(options.files, options.out):
        print(path)
    return 0


_READERS = {
    "compare": (_compare, "A.json B.json"),
    "check": (_check, "FILE... [--require cpu|cuda]"),
    "report": (_report, "FILE... [--out FOLDER]"),
}

_HEADER = (
    f"{'case':42} {'direction':16} {'backend':9} {'precision':9} {'ours ms':>9} {'spread':>6} "
    f"{'peer ms':>9} {'ratio':>8} {'limit ms':>9} {'of limit':>8} {'peak MB':>8} {'theirs':>8} {'n':>3}  peer"
)


def _line(row: Row) -> str:
    peaks = " ".join(f"{'?' if mb is None else f'{mb:.1f}':>8}" for mb in (row.peak_mb, row.peer_peak_mb))
    return (
        f"{row.case:42} {row.direction:16} {row.backend:9} {row.precision:9} {row.ours_ms:9.4g} "
        f"{row.ours_spread:6.2f} {row.peer_ms:9.4g} {row.ratio:7.2f}x {row.limit_ms:9.4g} {row.of_limit:8.1%} "
        f"{peaks} {row.n:3}  {row.peer}"
    )


if __name__ == "__main__":
    sys.exit(main())
