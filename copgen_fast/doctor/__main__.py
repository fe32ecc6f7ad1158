"""Diagnose this machine, or a generator on it: python -m copgen_fast.doctor [--generator NAME] [--json FILE] [--quick].

Hardware and software, the backend that every op uses and why, its accuracy beside PyTorch's operators, and estimates
of how long the paper's two runs would take. Of a generator: what it is found to do, a grid of samples, and how long its
navigator and pairs would take.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from copgen_fast.config import GeneratorConfig
from copgen_fast.doctor import accuracy, machine
from copgen_fast.doctor.accuracy import Check
from copgen_fast.errors import command
from copgen_fast.ops.backend import backends, reason, resolve
from copgen_fast.options import parse
from copgen_fast.runtime import artifacts, devices


@dataclass(frozen=True)
class DoctorConfig:
    """Report hardware, software, backends and their accuracy, and estimate the paper's runs: half a minute.

    With --generator NAME, report on that generator alone.
    """

    json: Path | None = None
    """File for the report, as JSON."""
    quick: bool = False
    """Leave out the estimates: a few seconds."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    generator: GeneratorConfig = field(default_factory=lambda: GeneratorConfig(name=""))
    """The generator to report on."""
    grid: Path = Path("samples.png")
    """File for a grid of its samples."""


@command
def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns 0, 1 where an op is not accurate enough, 2 for a usage error."""
    options = parse(DoctorConfig, arguments, "python -m copgen_fast.doctor")
    device = devices.resolve(options.device, "fp32")
    devices.make_current(device)
    if options.generator.name:
        from copgen_fast.doctor import generator

        with devices.full_float32():
            found, healthy = generator.examine(options.generator, device, options.grid, options.quick), True
    else:
        found, healthy = examine(device, options.quick)
    if options.json is not None:
        artifacts.write_json(options.json, found)
    return 0 if healthy else 1


def examine(device: torch.device, quick: bool) -> tuple[dict[str, object], bool]:
    """Print the report as it is made; returns it, and whether every op is accurate enough."""
    facts = list(machine.facts(device))
    show("machine", ([fact.name, str(fact)] for fact in facts))
    chosen = [(op, resolve(op, device), reason(op, device)) for op in backends()]
    show(f"ops on {device}, float32", ([op, backend, f"({why})"] for op, backend, why in chosen))
    checks = list(accuracy.checks(device))
    header = ["op", "backend", "dtype", "of", "error", "PyTorch's", "ratio", ""]
    show("relative errors against float64, beside PyTorch's operators", [header, *map(_check, checks)])
    found: dict[str, object] = {
        "device": str(device),
        "machine": [asdict(fact) for fact in facts],
        "backends": {op: {"backend": backend, "why": why} for op, backend, why in chosen},
        "accuracy": [asdict(check) for check in checks],
    }
    if not quick:
        found["estimates"] = _estimates(device)
    return found, all(check.passed for check in checks)


def _check(check: Check) -> list[str]:
    verdict = "" if check.passed else f"more than {check.allowed:g} times PyTorch's: report this"
    numbers = f"{check.error:.1e}", f"{check.pytorch:.1e}", f"{check.ratio:.2f}"
    return [check.op, check.backend, check.dtype, check.of, *numbers, verdict]


def _estimates(device: torch.device) -> list[dict[str, object]]:
    from copgen_fast.doctor import estimates

    busy = f"; load {os.getloadavg()[0]:.1f} as they start" if hasattr(os, "getloadavg") else ""
    print(f"\nthe paper's runs: estimates from a few steps on random weights, without reading data{busy}", flush=True)
    done = []
    for call in estimates.estimates(device):
        one = call()
        print(one, flush=True)
        done.append(asdict(one))
    return done


def show(title: str, rows: Iterable[list[str]]) -> None:
    """Print a table in aligned columns under a title."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    print(f"\n{title}\n" + "\n".join(f"  {line}" for line in lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
