"""Writes shards of pairs. Pair i depends on seed start_seed + i alone; a shard appears only when whole."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from copgen_fast.config import PairsConfig, RunConfig, faults
from copgen_fast.errors import UsageError
from copgen_fast.pairs import parts
from copgen_fast.pairs.format import Index, Shard, Span, add_member, key, members, sidecar, write_index
from copgen_fast.pairs.parts import Part
from copgen_fast.pairs.write.pipeline import Batch, Pipeline
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.runtime import artifacts, interrupts

Progress = Callable[[int], None]


def write_pairs(
    folder: Path, source: PairSource, config: PairsConfig, identity: dict, progress: Progress | None = None
) -> dict:
    """Write the shards of part `config.part` of `config.parts` that `folder` still lacks, and its index after each.

    Args:
        identity: what makes the pairs (digests, names, seeds), as JSON values.
        progress: called with the number of the part's pairs that are there, then with that of each batch written.

    Returns:
        count (pairs of all parts), written, seconds, images_per_s (both of this call; two images a pair)
        and displacement_mean (L2, over all pairs; None while other parts' are missing).

    Raises:
        UsageError: a value of `config` is out of range, or the folder holds pairs of another identity, or is read-only.
        NonFiniteError: a NaN or an infinity; the message names the tensor and the pair.
        Interrupted: a stop was requested; whole shards are kept.
        CopgenError: the disk is full, or an encoding worker died; whole shards are kept.
    """
    for fault in faults(RunConfig(stages=("pairs",), pairs=config)):
        raise UsageError(fault)
    part = Part(config.part, config.parts)
    index, done = _open(folder, source, config, json.loads(json.dumps(identity)), part)
    mine = part.spans(config.count, config.shard_size)
    missing = [span for span in mine if span.name not in done]
    progress = progress or (lambda count: None)
    if there := sum(span.count for span in mine if span.name in done):
        progress(there)
    start = time.perf_counter()
    with torch.no_grad(), Pipeline(source, config) as pipeline:
        batches = pipeline.encoded(missing)
        for span in missing:
            done[span.name] = _write_shard(folder, span, batches, config, progress)
            index = dataclasses.replace(index, image_shape=pipeline.image_shape)
            own = parts.listing(index, (shard for shard in done.values() if part.owns(shard.name)))
            write_index(folder, own, part.index_name)
    seconds = time.perf_counter() - start
    written = sum(span.count for span in missing)
    whole = parts.complete(folder, part)
    return {
        "count": config.count,
        "written": written,
        "seconds": seconds,
        "images_per_s": 2 * written / seconds,
        "displacement_mean": None if whole is None else whole.displacement_mean,
    }


def _open(
    folder: Path, source: PairSource, config: PairsConfig, identity: dict, part: Part
) -> tuple[Index, dict[str, Shard]]:
    """An index of no shards, and the shards that are there, whoever wrote them; other pairs are a UsageError."""
    index = Index(identity, config.count, config.shard_size, (3, 0, 0), source.latent_dim, config.codec, ())
    found = parts.indexes(folder)
    for there in found.values():
        sizes = {"count": config.count, "shard_size": config.shard_size, "latent_dim": source.latent_dim}
        parts.require_same(folder, there, identity, **sizes, codec=config.codec)
        index = dataclasses.replace(index, image_shape=there.image_shape)
    parts.remove_leftovers(folder, part)
    return index, parts.whole_shards(folder, found, part.index_name)


def _write_shard(folder: Path, span: Span, batches: Iterator[Batch], config: PairsConfig, progress: Progress) -> Shard:
    """Write one shard from the next batches, which are its."""
    path, latents_path = folder / span.name, folder / sidecar(span.name)
    with artifacts.atomic(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(0, span.count, config.batch):
                if interrupts.stop_requested():
                    raise interrupts.Interrupted(
                        f"stopped before {span.name} in {folder} was whole: the shards before it are kept; "
                        "run the same command to go on"
                    )
                batch = next(batches)
                drawn = batch.drawn
                for index, files in enumerate(batch.files, batch.first):
                    record = json.dumps(drawn.records[index - span.first]).encode()
                    for member, data in zip(members(config.codec), (*files, record), strict=True):
                        add_member(tar, f"{key(index)}.{member}", data)
                progress(len(batch.files))
        # Before the tar takes its name, so that no tar is ever without its latents.
        artifacts.write_tensors(latents_path, {"z": drawn.z, "z_positive": drawn.z_positive})
        tar_facts = temporary.stat().st_size, artifacts.sha256(temporary)
    latent_facts = latents_path.stat().st_size, artifacts.sha256(latents_path)
    return Shard(*span, *tar_facts, *latent_facts, sum(record["displacement"] for record in drawn.records) / span.count)
