"""Check the pairs of a run, or packed images: python -m copgen_fast.verify FOLDER [--samples N]."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from copgen_fast.config import RunConfig, faults
from copgen_fast.errors import UsageError, command
from copgen_fast.images import store
from copgen_fast.options import CountOrZero, Seed, parse
from copgen_fast.pairs.verify import verify_pairs
from copgen_fast.record import expect_current, expect_valid, from_identity
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, devices
from copgen_fast.stages import Run
from copgen_fast.stages.pairs import open_source


@dataclass(frozen=True)
class VerifyConfig:
    """Check every shard's sha256, make some pairs again from their seeds, and compare."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or one of packed images, of which every shard's sha256 is compared."""
    samples: CountOrZero = 16
    """Pairs to make again, of every way of making positives."""
    seed: Seed = 0
    """Chooses those pairs."""
    device: str = "auto"


def _in_float32(config: RunConfig) -> RunConfig:
    """With a generator that any device has: what half precision may change beside it, `verify_pairs` allows."""
    level = "exact" if config.generator.level in ("half", "graph") else config.generator.level
    return replace(config, generator=replace(config.generator, level=level))


def _verify(run: Run, name: str, level: str, options: VerifyConfig) -> None:
    source, identity = open_source(run, name)
    identity["generator_level"] = level
    found = verify_pairs(run.pairs_folder(name), source, identity, options.samples, options.seed)
    print(
        f"{label(name)}: {found['shards']} shards as recorded; {found['samples']} pairs made again, "
        f"pixels differ by at most {found['max_level_difference']} levels"
    )


@command
def main(arguments: list[str] | None = None) -> int:
    """Verify a run's pairs; returns 0 when all is as recorded, 1 when not, 2 for a fault of usage."""
    options = parse(VerifyConfig, arguments, "python -m copgen_fast.verify")
    if store.is_store(options.run):
        print(f"{options.run}: {store.verify(options.run)} shards of packed images as recorded")
        return 0
    path = artifacts.require(options.run / "config.json", "pairs")
    record = artifacts.read_json(path)
    expect_valid(record, path)
    expect_current(record, options.run)
    config = from_identity(record)
    for fault in faults(config):
        raise UsageError(f"{path}: {fault}")
    if config.pretrain.data == "online" and not (options.run / "pairs").exists():
        raise UsageError(f"{options.run}: its pairs were drawn while training: there are no shards to verify")
    run = Run(_in_float32(config), options.run, devices.resolve(options.device, "fp32"))
    devices.make_current(run.device)
    with devices.full_float32():
        for name in config.pairs.positives:
            _verify(run, name, config.generator.level, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
