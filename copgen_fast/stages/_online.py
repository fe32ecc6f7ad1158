"""Pairs that pretraining draws itself (--pretrain.data online), in place of the pairs stage."""

from __future__ import annotations

import json

from copgen_fast import generators
from copgen_fast.errors import UsageError
from copgen_fast.pairs.online import OnlinePairs
from copgen_fast.pairs.write.source import displacements
from copgen_fast.record import differences
from copgen_fast.runtime import artifacts
from copgen_fast.stages.pairs import MEASURED, by_group, open_source
from copgen_fast.stages.run import Run

RECORD = "pairs.json"
"""What decided the pairs, beside the encoder that was pretrained on them."""


def open_pairs(run: Run) -> dict[str, OnlinePairs]:
    """The pairs of every source, made by one generator; records what decides them, and the generator.

    Raises:
        UsageError: an artefact that a source needs is missing (T_z, walks), or an encoder was pretrained on others.
        CorruptArtifactError: a record is altered.
    """
    config = run.config.pairs
    G = generators.load(run.config.generator, run.device, batch=generated(run))
    run.expect_classes(G.classes)
    found = {name: open_source(run, name, G) for name in run.sources}
    for name, (source, identity) in found.items():
        sizes = {"count": config.count, "positives": source.positives, "endless": config.endless}
        _record(run, name, json.loads(json.dumps(identity | sizes)))
    if run.ranks.first:
        artifacts.write_record(run.generator_record, G.record)
    options = config.count, config.start_seed, config.samples_per_class, config.endless
    return {name: OnlinePairs(source, *options) for name, (source, _) in found.items()}


def generated(run: Run) -> int:
    """Images that this process generates at once."""
    return (1 + run.config.pairs.positives_per_anchor) * run.config.pretrain.batch // run.ranks.world


def distances(run: Run, pairs: OnlinePairs) -> dict[str, float]:
    """E||z' - z|| over the first pairs, as the summary of the pairs stage has it, and in each latent group."""
    config = run.config.pairs
    seeds = range(config.start_seed, config.start_seed + min(config.count, MEASURED))
    mean = displacements(*pairs.source.draw(seeds)).mean().item()
    return {"displacement_mean": mean} | by_group(pairs.source, config)


def _record(run: Run, source: str, pairs: dict) -> None:
    path = run.pretrain_folder(source) / RECORD
    if path.exists() and (changes := differences(artifacts.read_record(path), pairs)):
        raise UsageError(
            f"{path.parent} was pretrained on other pairs: {', '.join(changes)}: use another --out, or delete that "
            "folder"
        )
    if run.ranks.first:
        artifacts.write_record(path, pairs)
