"""Run the pipeline: python -m copgen_fast.train PRESET [--stages ...] [--out DIR] [--dotted.field value].

On several GPUs or hosts: torchrun --nproc-per-node 4 -m copgen_fast.train PRESET ...; docs/slurm.sh has a whole job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
import tyro

from copgen_fast import __version__, artifacts, augmentations, devices, distributed, optimizers, registry
from copgen_fast.config import PRESETS, STAGES, RunConfig, differences, faults, identity
from copgen_fast.distributed import ALONE, Ranks
from copgen_fast.errors import CopgenError, UsageError, report
from copgen_fast.interrupts import handle_signals
from copgen_fast.ops import backends
from copgen_fast.pairs.parts import Part
from copgen_fast.stages import Run

COMMAND = "python -m copgen_fast.train"
SHARED = ("navigator", "pairs", "pretrain")
"""Stages that several processes compute together."""


def parse(arguments: list[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Raises:
        UsageError: an unknown preset or field, or a value that does not fit.
        SystemExit: help was asked for and printed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {COMMAND} PRESET [options]\n\npresets: {', '.join(PRESETS)}\n")
        arguments = [next(iter(PRESETS)), "--help"]
    preset, *options = arguments
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}{_closest(preset, PRESETS)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(RunConfig, prog=f"{COMMAND} {preset}", args=options, default=PRESETS[preset])
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(_one_line(complaint.getvalue())) from error


def _closest(word: str, known: dict) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(box: str) -> str:
    """tyro's framed message as one plain line, without its title and its pointer to --help."""
    text = " ".join(line.strip("│ ") for line in box.splitlines() if line.startswith("│"))
    text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", text or box)
    return re.sub(r"\s+", " ", text.partition("For full helptext")[0]).strip()


def validate(config: RunConfig) -> None:
    """Refuse a configuration that no stage could run, before anything is written.

    Raises:
        UsageError: a number out of range, or a name that nothing goes by.
    """
    for fault in faults(config):
        raise UsageError(fault)
    registry.load("copgen_fast.generators", config.generator.name)
    for name in config.probe.evals:
        registry.load("copgen_fast.evals", name)
    for name in (config.navigator.augmentation, config.pretrain.augmentation, config.probe.augmentation):
        augmentations.get(name)
    for name in ("navigator", "pretrain"):
        if name in config.stages:
            distributed.expect_divisible(f"{name}.batch", getattr(config, name).batch)
    if "pretrain" in config.stages:
        part = config.pretrain.batch // config.pretrain.accumulate
        distributed.expect_divisible("pretrain.batch / pretrain.accumulate", part)


def open_run(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Run:
    """Make or reopen the run folder and record its configuration and the versions in use; rank 0 does.

    Raises:
        UsageError: the folder holds something else, or a run of another configuration.
        LostRankError: rank 0 found such a fault.
    """
    # Recorded as what it came to: resumed on a device of another precision, the run would be another.
    config = dataclasses.replace(config, precision=devices.resolve_precision(config.precision, device))
    optimizers.resolve(config.optimizer.impl, device)
    folder = Path(config.out)
    if ranks.first:
        record_run(config, folder, device, ranks)
    ranks.meet("the run folder")
    if not (folder / "config.json").exists():
        raise UsageError(f"--out {folder} is not the same folder for all processes: choose one that all hosts share")
    return Run(config, folder, device, ranks)


def record_run(config: RunConfig, folder: Path, device: torch.device, ranks: Ranks) -> None:
    """Check that `folder` is this run's, then write config.json and versions.json."""
    record, wanted = folder / "config.json", identity(config, ranks.world)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    present -= {name for name in present if name.endswith(".incomplete")}  # what another process begins to record
    if record.name in present:
        # What a record lacks, an older version wrote it without: then it ran as the default does.
        changed = differences(identity(RunConfig()) | artifacts.read_json(record), wanted)
        if changed and present - {record.name, "versions.json"}:
            why = " (batch norm's statistics depend on it)" if changed[0].startswith("processes") else ""
            raise UsageError(
                f"--out {folder} holds a run of another configuration: {'; '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}{why}: choose another --out"
            )
    elif folder.is_file() or (present and not holds_only_a_navigator(folder)):
        raise UsageError(f"--out {folder} is not empty and holds no run: choose another --out")
    by = Part(config.pairs.part, config.pairs.parts).mark  # writers of parts may open one folder at the same time
    artifacts.write_json(record, wanted, by)
    artifacts.write_json(folder / "versions.json", versions(device) | {"processes": str(ranks.world)}, by)


def holds_only_a_navigator(folder: Path) -> bool:
    """Whether a folder without a run has an imported T in it (`python -m copgen_fast.convert navigator`), no more."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return files == ["navigator/navigator.safetensors"]


def versions(device) -> dict[str, str]:  # noqa: ANN001
    """What computed the run, for its record."""
    packages = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    return {"copgen_fast": __version__, "python": platform.python_version(), "device": str(device), **found}


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; returns the exit code: 0, 2 for a fault of usage, 130 when stopped, else 1."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        validate(config)
        device = devices.resolve(distributed.local_device(config.device), config.precision)
        devices.make_current(device)
        with handle_signals(), distributed.joined(device, config.timeout) as ranks:
            run_stages(open_run(config, device, ranks))
    except CopgenError as error:
        return report(error, distributed.name())
    except KeyboardInterrupt:
        print("copgen_fast: interrupted at once; the run goes on from its last checkpoint", file=sys.stderr)
        return 130
    return 0


def run_stages(run: Run) -> None:
    """Run the stages that the configuration asks for; those that nothing is shared of, on rank 0 alone."""
    tell = print if run.ranks.first else lambda *values, **options: None
    tell(f"run folder {run.folder}, device {run.device}, ops {backends()}", flush=True)
    for stage in (stage for stage in STAGES if stage in run.config.stages):
        if run.ranks.first or stage in SHARED:
            started = time.perf_counter()
            importlib.import_module(f"copgen_fast.stages.{stage}").run(run)
            tell(f"{stage}: done in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    distributed.leave(main())
