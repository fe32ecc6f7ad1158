"""Runs that were trained before the study: `study --reuse RUN` links their parts instead of making them once more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from copgen_fast import train
from copgen_fast.errors import UsageError
from copgen_fast.record import WEIGHTS_DIGEST, changes, expect_valid, identity
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, devices
from copgen_fast.studies._plan import Planned, Unit, of_folder


def reuse(planned: Sequence[Planned], folders: Sequence[Path]) -> list[Planned]:
    """The planned runs, of which those that a run in `folders` holds take all but their evaluation from there.

    Raises:
        UsageError: a folder holds no run, or none of the planned ones.
        CorruptArtifactError: its record is altered.
    """
    found = list(planned)
    for folder in folders:
        if not (record := folder / "config.json").exists():
            raise UsageError(f"--reuse {folder}: there is no run: give the --out of a finished one")
        there = artifacts.read_json(record)
        expect_valid(there, record)
        lacks = [_lacks(run, there, folder) for run in found]
        if all(lacks):
            closest = min(lacks, key=len)
            raise UsageError(
                f"--reuse {folder} holds none of the study's runs; what comes closest: {'; '.join(closest[:3])}"
                f"{' and more' if len(closest) > 3 else ''}: leave it out, or give its settings"
            )
        found = [run if lack else _linked(run, folder) for run, lack in zip(found, lacks, strict=True)]
    return found


def _lacks(run: Planned, there: dict[str, object], folder: Path) -> list[str]:
    """How the run in a folder, with record `there`, differs from a planned one; empty where it holds that."""
    config = run.unit.config
    here = identity(train.resolved(config, folder, devices.resolve(config.device, config.precision)))
    evaluated = ("probe.", "evals.", *(("data.",) if config.pretrain.data != "real" else ()))
    here = {name: value for name, value in here.items() if not name.startswith(evaluated)}
    # It may have other ways of making positives, too, and their options.
    there = {name: value for name, value in there.items() if name in here or name == WEIGHTS_DIGEST}
    if set(here["pairs.positives"]) <= set(there["pairs.positives"]):
        there["pairs.positives"] = here["pairs.positives"]
    if found := changes(there, here):
        return found
    encoder = dataclasses.replace(of_folder(run.unit), folder=folder).encoder_file(run.source)
    return [] if encoder.exists() else [f"{encoder} is missing"]


def _linked(run: Planned, folder: Path) -> Planned:
    made, source = Unit(f"run {folder}", folder, (), run.unit.config, ()), label(run.source)
    names = ("navigator", "steering", f"pairs/{source}", f"pretrain/{source}")
    links = tuple((name, made) for name in names if (folder / name).exists())
    return dataclasses.replace(run, unit=dataclasses.replace(run.unit, links=links))
