"""Writer of shards of pairs. Pair i depends on seed start_seed + i alone; a shard appears only when complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from copgen_fast.config import PairsConfig, RunConfig, faults
from copgen_fast.errors import UsageError
from copgen_fast.files import sha256
from copgen_fast.pairs import shares
from copgen_fast.pairs.format import (
    Index,
    Shard,
    Span,
    is_shard,
    key,
    members,
    plan,
    sidecar,
    write_index,
)
from copgen_fast.pairs.shares import Share
from copgen_fast.pairs.write.pipeline import EncodedBatch, encoded_batches
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.runtime import artifacts, interrupts
from copgen_fast.runtime.tars import add_member

Progress = Callable[[int], None]


def write_pairs(
    folder: Path, source: PairSource, config: PairsConfig, identity: dict, progress: Progress | None = None
) -> dict:
    """Write the missing shards of writer `config.part` of `config.parts` into `folder`, and its index after each.

    Args:
        identity: digests, names and seeds that determine the pairs, as JSON values.
        progress: called with the number of the writer's pairs that are there, then with that of each batch written.

    Returns:
        count (pairs of all writers), written, seconds, images_per_s (both of this call; two images a pair, or 1 + K)
        and displacement_mean (L2, over all pairs; None while other writers' are missing).

    Raises:
        UsageError: a value of `config` is out of range, or the folder holds pairs of another identity, or is read-only.
        NonFiniteError: a NaN or an infinity; the message names the tensor and the pair.
        Interrupted: a stop was requested; complete shards are kept.
        CopgenError: the disk is full; complete shards are kept.
    """
    for fault in faults(RunConfig(stages=("pairs",), pairs=config)):
        raise UsageError(fault)
    share = Share(config.part, config.parts)
    index, shards = _open(folder, source, config, json.loads(json.dumps(identity)), share)
    spans = share.spans(config.count, config.shard_size)
    missing = [span for span in spans if span.name not in shards]
    progress = progress or (lambda count: None)
    if present := sum(span.count for span in spans if span.name in shards):
        progress(present)
    start = time.perf_counter()
    with torch.no_grad(), contextlib.closing(encoded_batches(source, config, missing)) as batches:
        for span in missing:
            shards[span.name], image_shape = _write_shard(folder, span, batches, config, progress)
            index = dataclasses.replace(index, image_shape=image_shape)
            own = index.with_shards(shard for shard in shards.values() if share.owns(shard.name))
            write_index(folder, own, share.index_name)
    seconds = time.perf_counter() - start
    written = sum(span.count for span in missing)
    complete = shares.complete_index(folder, share)
    return {
        "count": config.count,
        "written": written,
        "seconds": seconds,
        "images_per_s": (1 + source.positives) * written / seconds,
        "displacement_mean": None if complete is None else complete.displacement_mean,
    }


def _open(
    folder: Path, source: PairSource, config: PairsConfig, identity: dict, share: Share
) -> tuple[Index, dict[str, Shard]]:
    """An index without shards, and the finished shards of all writers; other pairs are a UsageError."""
    index = Index(identity, config.count, config.shard_size, (3, 0, 0), source.latent_dim, config.codec, ())
    index = dataclasses.replace(index, positives=source.positives)
    indexes = shares.read_indexes(folder)
    for found in indexes.values():
        sizes = {"count": config.count, "shard_size": config.shard_size, "latent_dim": source.latent_dim}
        shares.require_same(folder, found, identity, **sizes, codec=config.codec, positives=source.positives)
        index = dataclasses.replace(index, image_shape=found.image_shape)
    shares.remove_leftovers(folder, share)
    finished = shares.finished_shards(folder, indexes, share.index_name)
    _tell_what_is_there(folder, indexes, finished, share, plan(config.count, config.shard_size))
    return index, finished


def _tell_what_is_there(
    folder: Path, indexes: dict[str, Index], finished: dict[str, Shard], share: Share, spans: list[Span]
) -> None:
    """Compare the shards in a folder with its index: say which are missing or cut short, refuse extra ones.

    Raises:
        UsageError: there are shards that these pairs don't have.
    """
    wanted = {name for span in spans for name in (span.name, sidecar(span.name))}
    if extra := [path.name for path in folder.glob("shard-*") if is_shard(path.name) and path.name not in wanted]:
        raise UsageError(f"{folder} holds {min(extra)}, which is none of its shards: remove it, or use another --out")
    listed = {shard.name for index in indexes.values() for shard in index.shards if share.owns(shard.name)}
    if lost := sorted(listed - finished.keys()):
        print(f"{folder}: {len(lost)} shards are missing or cut short, from {lost[0]} on: written again", flush=True)


def _write_shard(
    folder: Path, span: Span, batches: Iterator[EncodedBatch], config: PairsConfig, progress: Progress
) -> tuple[Shard, tuple[int, int, int]]:
    """Write a shard from the next batches, which are its own; returns its entry and its images' shape."""
    path, latents_path = folder / span.name, folder / sidecar(span.name)
    with artifacts.atomic(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(0, span.count, config.batch):
                if interrupts.stop_requested():
                    raise interrupts.Interrupted(
                        f"stopped before {span.name} in {folder} was complete: the shards before it are kept; "
                        "run the same command to go on"
                    )
                batch = next(batches)
                latents = batch.latents
                for index, files in enumerate(batch.files, batch.first):
                    record = json.dumps(latents.records[index - span.first]).encode()
                    for member, data in zip(members(config.codec, len(files) - 1), (*files, record), strict=True):
                        add_member(tar, f"{key(index)}.{member}", data)
                progress(len(batch.files))
        # Before the tar takes its name, so that no tar is ever without its latents.
        artifacts.write_tensors(latents_path, {"z": latents.z, "z_positive": latents.z_positive})
        tar_facts = temporary.stat().st_size, sha256(temporary)
    latents_facts = latents_path.stat().st_size, sha256(latents_path)
    mean = sum(record["displacement"] for record in latents.records) / span.count
    return Shard(*span, *tar_facts, *latents_facts, mean), batch.image_shape
