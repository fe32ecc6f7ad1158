"""Run the pipeline: python -m copgen_fast.train PRESET [--stages ...] [--out DIR] [--dotted.field value].

`--help` lists presets and parts, `PRESET --help` every option, `--help NAME` the options of a part.
On several GPUs or hosts: torchrun --nproc-per-node 4 -m copgen_fast.train PRESET ...; docs/slurm.sh has a whole job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from copgen_fast import __version__, augmentations, evals, generators, methods, options, positives, registry
from copgen_fast.config import STAGES, GeneratorConfig, RunConfig, faults, pairs_drawn
from copgen_fast.errors import CopgenError, ExhaustedError, UsageError, command, exhausted, explain
from copgen_fast.ops import backends
from copgen_fast.pairs.read import dali
from copgen_fast.pairs.shares import Share
from copgen_fast.positives import steering
from copgen_fast.presets import PRESETS
from copgen_fast.record import (
    INVOCATION,
    RENAMED,
    WEIGHTS_DIGEST,
    changes,
    defaults,
    expect_current,
    expect_valid,
    identity,
)
from copgen_fast.runtime import artifacts, devices, distributed
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.interrupts import Interrupted, handle_signals
from copgen_fast.stages import Run, _calibration, _real_images
from copgen_fast.training import optimizers

COMMAND = "python -m copgen_fast.train"
SHARED = ("navigator", "steering", "pairs", "pretrain")
"""Stages that several processes compute together."""
SPARING = {
    "navigator": "--generator.checkpoint (where the generator has it) goes on from the last checkpoint with less; or "
    "another --out with a smaller batch",
    "steering": "--generator.checkpoint (where the generator has it) goes on from the last checkpoint with less; or "
    "another --out with a smaller --steering.batch",
    "pairs": "choose another --out with a smaller --pairs.batch",
    "pretrain": "--pretrain.checkpoint goes on from the last checkpoint with less; or another --out with a larger "
    "--pretrain.accumulate or a smaller batch",
    "probe": "choose a smaller --probe.batch",
}
"""By stage, what to do where memory runs out."""

DIGITS = ("digits", "residual-flow", "mnist", "svhn", "usps")
"""Generators and data sets of digits."""


def parse(arguments: list[str]) -> RunConfig:
    """The configuration of a command line.

    Raises:
        UsageError: an unknown preset or field, or a value that does not fit.
        SystemExit: help was printed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(arguments[1:]))
        raise SystemExit(0)
    preset, *words = arguments
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}{_closest(preset, PRESETS)}")
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in RENAMED:
            raise UsageError(f"--{name.replace('_', '-')} has moved: write --{RENAMED[name]}")
    config = options.parse(RunConfig, words, f"{COMMAND} {preset}", default=PRESETS[preset])
    return _without_options_of_others(config, PRESETS[preset])


def _without_options_of_others(config: RunConfig, preset: RunConfig) -> RunConfig:
    """A configuration whose options that only its preset gives are those of the parts that it has."""
    pairs, probe = config.pairs, config.probe
    if pairs.options == preset.pairs.options:
        pairs = dataclasses.replace(pairs, options=registry.options_of(pairs.options, pairs.positives))
    if probe.options == preset.probe.options:
        probe = dataclasses.replace(probe, options=registry.options_of(probe.options, probe.evals))
    return dataclasses.replace(config, pairs=pairs, probe=probe)


def help_text(names: list[str]) -> str:
    """Presets and built-in parts, or the options of the parts called so.

    Raises:
        UsageError: no part goes by that name.
    """
    if not names:
        parts = "\n".join(f"  {kind:12}{', '.join(registry.names(kind))}" for kind in registry.KINDS)
        return (
            f"usage: {COMMAND} PRESET [options]\n\npresets: {', '.join(PRESETS)}\n\nparts (or a module of your own, "
            f"my_package.my_part, or a file, ./my_part.py):\n{parts}\n\n{COMMAND} PRESET --help    every option\n"
            f"{COMMAND} --help NAME      the options of a part"
        )
    found = []
    for name in names:
        kinds = [kind for kind in registry.KINDS if name in registry.names(kind)]
        if not kinds and (name.endswith(".py") or "." in name):
            kinds = [registry.kind_of(name)]
        if not kinds:
            known = sorted({known for kind in registry.KINDS for known in registry.names(kind)})
            raise UsageError(f"no part is called {name!r}: choose from {', '.join(known)}")
        found += [registry.describe(kind, name) for kind in kinds]
    return "\n".join(found)


def wanted_stages(config: RunConfig) -> list[str]:
    """The configured stages in their order; steering only where its positives are wanted, pairs unless they are drawn
    by pretraining itself.
    """
    left_out = set() if "steering" in config.pairs.positives else {"steering"}
    if "pretrain" in config.stages and config.pretrain.data == "online":
        left_out.add("pairs")
    return [stage for stage in STAGES if stage in config.stages and stage not in left_out]


def _closest(word: str, known: dict) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def validate(config: RunConfig) -> None:
    """Check, before anything is written, that the stages can run a configuration.

    Raises:
        UsageError: a number out of range, an unknown name or option, DALI that is not there, or real images that
            are missing or not as a stage needs them.
    """
    for fault in faults(config, distributed.world_size()):
        raise UsageError(fault)
    if "pretrain" in config.stages and config.pretrain.loader == "dali":
        dali.require()
    identity(config)  # loads every part and checks its options
    for name in (config.navigator.augmentation, config.pretrain.augmentation):
        augmentations.get(name)
    if config.navigator.delta == "auto" and "navigator" in config.stages:
        _calibration.augmentation_of(config)
    steering.limits_of(config.steering)
    if positives.groups_named(config) and {"navigator", "steering", "pairs"} & set(config.stages):
        generator = config.generator
        positives.expect_groups(
            config, generators.build(generator.name, generator.weights, generator.options).latent_groups
        )
    for name in ("navigator", "steering", "pretrain"):
        if name in wanted_stages(config):
            distributed.expect_divisible(f"{name}.batch", getattr(config, name).batch)
    if "pretrain" in config.stages:
        part = config.pretrain.batch // config.pretrain.accumulate
        distributed.expect_divisible("pretrain.batch / pretrain.accumulate", part)
        if config.pretrain.data != "real":
            setting = methods.Setting(pairs_drawn(config), config.pretrain.batch)
            methods.configure(config.method.name, config.method.options, setting)
    _real_images.check(config, probed_here=distributed.first())


def caveats(config: RunConfig) -> list[str]:
    """Warnings about settings that are allowed but rarely intended, one line each."""
    drawn = config.generator.name in DIGITS
    real = config.pretrain.data == "real"
    uses = {
        "navigator": (config.navigator.augmentation, drawn),
        "pretrain": (config.pretrain.augmentation, config.data.name in DIGITS if real else drawn),
    }
    return [
        f"{stage}.augmentation: {policy} mirrors images, and a mirrored digit is another sign: choose digits"
        for stage, (policy, digits) in uses.items()
        if stage in config.stages and digits and augmentations.get(policy).flip
    ]


@contextlib.contextmanager
def open_run(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Iterator[Run]:
    """Make or reopen the run folder and record its configuration and the versions in use; rank 0 does.

    Other commands are kept out of the folder for as long as the block lasts.

    Raises:
        UsageError: the folder holds something else, or a run of another configuration, or is in use.
        LostRankError: rank 0 found such a fault.
    """
    folder = Path(config.out)
    config = resolved(config, folder, device)
    optimizers.resolve(config.optimizer.impl, device)
    with contextlib.ExitStack() as held:
        if ranks.first:
            expect_own(config, folder, ranks)  # before a file of ours is in it
            held.enter_context(artifacts.folder_lock(folder, Share(config.pairs.part, config.pairs.parts).suffix))
            record_run(config, folder, device, ranks)
        ranks.barrier("the run folder")
        if not (folder / "config.json").exists():
            raise UsageError(
                f"--out {folder} is not the same folder for all processes: choose one that all hosts share"
            )
        yield Run(config, folder, device, ranks)


def resolved(config: RunConfig, folder: Path, device: torch.device) -> RunConfig:
    """A configuration as a run in `folder` records it: its precision, and a generator's level, as on this device."""
    # The precision itself is recorded: resumed on a device of another one, the run would be another.
    precision = devices.resolve_precision(config.precision, device)
    return dataclasses.replace(config, precision=precision, generator=_with_level(config, folder, device))


def _with_level(config: RunConfig, folder: Path, device: torch.device) -> GeneratorConfig:
    """The generator with the level of the run in `folder` or, where that has none yet, the device's; `auto` stays where
    no stage draws images.
    """
    record = folder / "config.json"
    if config.generator.level == "auto" and record.exists():
        there = artifacts.read_json(record)
        recorded = there.get("generator.level") if isinstance(there, dict) else None  # refused later if it is none
        if recorded in ("exact", "half"):
            return dataclasses.replace(config.generator, level=recorded)
    draws = {"steering", "navigator", "pairs"} & set(config.stages) or config.pretrain.data == "online"
    return generators.resolve_level(config.generator, device) if draws else config.generator


def record_run(config: RunConfig, folder: Path, device: torch.device, ranks: Ranks) -> None:
    """Check that `folder` is this run's, then write config.json and versions.json."""
    expect_own(config, folder, ranks)
    by = Share(config.pairs.part, config.pairs.parts).suffix  # writers of parts may open one folder at the same time
    record, wanted = folder / "config.json", identity(config, ranks.world)
    if record.exists() and WEIGHTS_DIGEST in (there := artifacts.read_json(record)):
        wanted = {WEIGHTS_DIGEST: there[WEIGHTS_DIGEST]} | wanted  # the weights may not be at hand now
    artifacts.write_json(record, wanted, by)
    artifacts.write_json(folder / "versions.json", versions(device) | {"processes": str(ranks.world)}, by)


def expect_own(config: RunConfig, folder: Path, ranks: Ranks) -> None:
    """Raises UsageError unless `folder` is empty or this run's."""
    record, wanted = folder / "config.json", identity(config, ranks.world)
    with artifacts.explain_disk(folder):
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # What another process begins to record, and locks.
    present -= {name for name in present if name.endswith((".incomplete", ".lock"))}
    if record.name in present:
        there = artifacts.read_json(record)
        expect_valid(there, record)
        expect_current(there, folder)
        # What a record lacks, an older version wrote it without: then it ran as the default does.
        there = {name: value for name, value in defaults(config).items() if name in wanted} | there
        # Options of a part that this configuration lacks: that the part itself is missing is said already.
        there = {name: value for name, value in there.items() if name in wanted or ".options." not in name}
        undrawn = ("generator.level",) if there.get("generator.level") == "auto" else ()
        open_still = (*_undecided(config, folder), *undrawn)
        there = {name: value for name, value in there.items() if not name.startswith(open_still)}
        changed = changes(there, {name: value for name, value in wanted.items() if not name.startswith(open_still)})
        if changed and present - {record.name, "versions.json"}:
            why = " (batch norm's statistics depend on it)" if changed[0].startswith("processes") else ""
            raise UsageError(
                f"--out {folder} holds a run of another configuration: {'; '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}{why}: choose another --out"
            )
    elif folder.is_file() or (present and not holds_only_a_navigator(folder)):
        raise UsageError(f"--out {folder} is not empty and holds no run: choose another --out")


def _undecided(config: RunConfig, folder: Path) -> tuple[str, ...]:
    """Prefixes of the settings that may still change, as no result in `folder` depends on them yet."""
    if any((folder / "probe").glob("*.json")):
        return INVOCATION
    return (*INVOCATION, "probe.", "evals.", *(("data.",) if config.pretrain.data != "real" else ()))


def holds_only_a_navigator(folder: Path) -> bool:
    """Whether a folder without a run has an imported T_z in it (`python -m copgen_fast.convert navigator`), no more."""
    if any(path.name != "navigator" and not path.name.endswith(".lock") for path in folder.iterdir()):
        return False
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    files = [name for name in files if not name.endswith(".lock")]
    return files == ["navigator/navigator.safetensors"]


def versions(device) -> dict[str, str]:  # noqa: ANN001
    """Versions of the packages that compute the run, and its device."""
    packages = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    return {"copgen_fast": __version__, "python": platform.python_version(), "device": str(device), **found}


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the configured stages; returns the exit code: 0, 2 for a fault of usage, 130 when stopped, else 1."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        validate(config)
        execute(config)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted at once; the run goes on from its last checkpoint") from error
    except Exception as error:
        if explain(error) or distributed.world_size() == 1:
            raise
        traceback.print_exc()  # and then `leave`: the interpreter's own end may wait for a collective
        return 1
    return 0


def execute(config: RunConfig, prepare: Callable[[Run], None] = lambda run: None) -> None:
    """Run the stages of a valid configuration in its folder, from where they were stopped.

    Args:
        prepare: called before the first stage, with the folder open.

    Raises:
        InUseError: another command works in the folder.
        CopgenError: as the stages do.
    """
    device = devices.resolve(distributed.local_device(config.device), config.precision)
    if "probe" in config.stages:
        devices.resolve(config.device, config.probe.precision)
    devices.make_current(device)
    with handle_signals(), devices.full_float32(), distributed.joined(device, config.timeout) as ranks:
        with open_run(config, device, ranks) as run:
            try:
                prepare(run)
                run_stages(run)
            except BrokenPipeError as error:
                raise CopgenError(
                    "what read the output has closed it: stopped; the same command goes on from the last checkpoint"
                ) from error


def run_stages(run: Run) -> None:
    """Run the configured stages; those that processes don't share, on rank 0 alone."""
    tell = print if run.ranks.first else lambda *values, **options: None
    for line in caveats(run.config):
        tell(f"warning: {line}", flush=True)
    tell(f"run folder {run.folder}, device {run.device}, ops {backends()}", flush=True)
    shared = (*SHARED, "probe") if any(map(evals.is_shared, run.config.probe.evals)) else SHARED
    for stage in wanted_stages(run.config):
        if run.ranks.first or stage in shared:
            started = time.perf_counter()
            try:
                importlib.import_module(f"copgen_fast.stages.{stage}").run(run)
            except Exception as error:
                run.expect_folder()
                if what := exhausted(error, SPARING.get(stage, "free some")):
                    raise ExhaustedError(f"{stage}: {what}") from error
                raise
            run.expect_folder()
            tell(f"{stage}: done in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    distributed.leave(main())
