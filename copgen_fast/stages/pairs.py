"""Write positive pairs (G(z), G(z')) offline, once for every way of making positives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from copgen_fast import generators, positives, registry
from copgen_fast.config import PairsConfig, RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.pairs.format import read_complete_index
from copgen_fast.pairs.shares import Share, complete_index, require_same
from copgen_fast.pairs.write.source import PairSource, each_positive
from copgen_fast.pairs.write.writer import write_pairs
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.progress import progress
from copgen_fast.stages.run import Run

MEASURED = 4096
"""Pairs by which distances in latent groups are measured."""


def run(run: Run) -> None:
    """Write the missing shards of every way in `--pairs.positives` into RUN/pairs/WAY, or those of --pairs.part.

    Several processes share them out, each a part of the part; rank 0 puts together what they wrote.
    """
    ranks, config = run.ranks, run.config.pairs
    part = Share(config.part + config.parts * ranks.rank, config.parts * ranks.world)
    config = dataclasses.replace(config, part=part.number, parts=part.count)
    G = generators.load(run.config.generator, run.device, config.batch)
    run.expect_classes(G.classes)
    artifacts.write_record(run.generator_record, G.record, by=part.suffix)
    sources = {name: open_source(run, name, G) for name in config.positives}
    if ranks.first:
        for name, (source, _) in sources.items():
            warn_of_equal_positives(name, source, config.start_seed)
    for name, (source, identity) in sources.items():
        own = write(run, name, source, config, identity)
        written = [json.loads(word) for word in ranks.barrier(f"the end of pairs {name}", json.dumps(own))]
        if ranks.first:
            summarize(run, name, source, written)
    ranks.barrier("the end of the pairs")


def warn_of_equal_positives(name: str, source: PairSource, seed: int) -> None:
    """Say so where a way draws nothing, so that several positives of an anchor are one image several times."""
    first, *others = each_positive(source.draw([seed])[1])
    if others and all(torch.equal(other, first) for other in others):
        print(
            f"warning: pairs {label(name)}: all {source.positives} positives of an anchor are the same image, as this "
            "way draws nothing at random: only their augmentations differ",
            flush=True,
        )


def write(run: Run, name: str, source: PairSource, config: PairsConfig, identity: dict) -> dict:
    """Write this process's share of one way; returns the summary of `write_pairs`."""
    images = (1 + config.positives_per_anchor) * sum(
        span.count for span in Share(config.part, config.parts).spans(config.count, config.shard_size)
    )
    with progress(images, f"pairs {label(name)}", "images", disable=not run.ranks.first) as bar:

        def written(pairs: int) -> None:
            bar.update((1 + config.positives_per_anchor) * pairs)
            run.ranks.mark(f"pairs {name}")

        summary = write_pairs(run.pairs_folder(name), source, config, identity, written)
    if summary["written"] == config.count:
        run.checked.add(name)
    return summary


def summarize(run: Run, name: str, source: PairSource, written: list[dict]) -> None:
    """Write summary.json once all shards are there: of all ranks' work, and of the whole set."""
    folder, config = run.pairs_folder(name), run.config.pairs
    part = Share(config.part, config.parts)  # of all ranks
    whole = complete_index(folder, part)
    if whole is None:
        print(f"pairs {name}: part {part.number} of {part.count} is written, others are not yet", flush=True)
        return
    pairs, seconds = sum(summary["written"] for summary in written), max(summary["seconds"] for summary in written)
    # A kill after the last shard leaves none: then the next run, which writes no pair, makes it up.
    if pairs or not (folder / "summary.json").exists():
        total = {"written": pairs, "seconds": seconds, "images_per_s": (1 + source.positives) * pairs / seconds}
        mean = {"displacement_mean": whole.displacement_mean} | by_group(source, config)
        artifacts.write_record(folder / "summary.json", written[0] | total | mean, by=part.suffix)


def by_group(source: PairSource, config: PairsConfig) -> dict[str, float]:
    """E||z' - z|| in each latent group of the generator, where there are several, over the first pairs."""
    groups = source.generator.latent_groups
    if len(groups) < 2:
        return {}
    z, z_positive = source.draw(range(config.start_seed, config.start_seed + min(config.count, MEASURED)))
    dz = torch.cat([one - z for one in each_positive(z_positive)])
    norms = positives.norms(dz, groups)
    return {name: norm.item() for name, norm in norms.items() if name != "displacement_norm"}  # that is of all pairs


def open_source(run: Run, positive: str, G: nn.Module | None = None) -> tuple[PairSource, dict]:
    """What makes the pairs of one way, and its record: the digests and settings that decide every pixel.

    Args:
        G: the run's generator, where it is loaded already.
    """
    config = run.config
    G = generators.load(config.generator, run.device, config.pairs.batch) if G is None else G
    setting = run.setting(G, positives.options(config.pairs)[positive])
    make = positives.build(positive, setting)
    label_of = None
    if G.classes:
        # The reference's pseudo-classes, in the order of the classes: 1300 pairs of each of ImageNet's 1000, again.
        def label_of(index: int) -> int:
            return index // config.pairs.samples_per_class % G.classes

    each, size = config.pairs.positives_per_anchor, config.pairs.size
    generators.expect_size(G, "pairs.size", size)
    source = PairSource(G, make, G.latent_dim, G.sample, run.device, label_of, each, size)
    identity = settings(config, positive) | {"prior": G.prior, "generator_digest": G.record["digest"]}
    if G.classes:
        identity["classes"] = G.classes
    if size is not None:
        identity["image_size"] = size
    identity |= positives.record(positive, setting)
    for option, value in G.record["options"].items():
        identity[f"generator.{option}" if option in identity else option] = value
    return source, identity


def settings(config: RunConfig, positive: str) -> dict:
    """The part of a record of pairs that the configuration alone says."""
    return {
        "generator": label(config.generator.name),
        "generator_level": config.generator.level,
        "positive": label(positive),
        "start_seed": config.pairs.start_seed,
        "samples_per_class": config.pairs.samples_per_class,
    }


@dataclasses.dataclass(frozen=True)
class GeneratorRecord:
    """generator.json, see `generators.load`."""

    name: str
    weights: str
    sha256: str
    digest: str
    options: dict[str, Any]
    difference: dict[str, Any] | None = None
    prior: str | None = None


def expect_own(run: Run, source: str) -> None:
    """Compare the record of a source's pairs with the run: its settings, and the generator and T_z at hand.

    Raises:
        UsageError: shards are missing, or the pairs are another run's or another source's.
        CorruptArtifactError: a record is altered.
    """
    config, folder = run.config, run.pairs_folder(source)
    index = read_complete_index(folder)
    wanted = settings(config, source) | {"image_size": config.pairs.size}
    prior = config.generator.prior
    if run.generator_record.exists():
        made = artifacts.read_record(run.generator_record, GeneratorRecord)
        wanted["generator_digest"] = made.digest
        prior = prior or made.prior
    if prior is not None:
        wanted["prior"] = prior
    if source in registry.names("positives"):
        G = SimpleNamespace(latent_dim=index.latent_dim, latent_groups=())  # which built-in ways don't record
        with contextlib.suppress(UsageError):  # the pairs were made elsewhere, with a navigator that isn't here
            wanted |= positives.record(source, run.setting(G, positives.options(config.pairs)[source]))
    found = {name: index.identity.get(name) for name in wanted}
    sizes = {"count": config.pairs.count, "shard_size": config.pairs.shard_size, "codec": config.pairs.codec}
    sizes["positives"] = config.pairs.positives_per_anchor
    require_same(folder, dataclasses.replace(index, identity=found), json.loads(json.dumps(wanted)), **sizes)
