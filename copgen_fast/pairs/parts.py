"""Several writers of one data set: whose each shard is, and what all indexes of a folder say together.

Nothing is coordinated. Writer I of N makes the shards whose number modulo N is I, into a folder that all share or one
of its own, and lists them in its own index.part-I-of-N.json. Whoever finds all shards listed writes index.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from copgen_fast.config import differences
from copgen_fast.errors import UsageError
from copgen_fast.pairs.format import PARTS, WHOLE, Index, Shard, Span, plan, read_index, sidecar, write_index


class Part(NamedTuple):
    """Writer `number` of `count`."""

    number: int = 0
    count: int = 1

    @property
    def mark(self) -> str:
        """What its files are told apart by; empty where one writer makes everything."""
        return f".part-{self.number}-of-{self.count}" if self.count > 1 else ""

    @property
    def index_name(self) -> str:
        return f"index{self.mark}.json"

    def owns(self, shard: str) -> bool:
        """Whether the shard of that name is this writer's."""
        return int(shard.removeprefix("shard-").partition(".")[0]) % self.count == self.number

    def spans(self, count: int, shard_size: int) -> list[Span]:
        """Its shards of `count` pairs."""
        return [span for span in plan(count, shard_size) if self.owns(span.name)]


def indexes(folder: Path) -> dict[str, Index]:
    """Every index of a folder by its file's name.

    Raises:
        UsageError, CorruptArtifactError: see `format.read_index`.
    """
    paths = [path for path in (folder / WHOLE, *sorted(folder.glob(PARTS))) if path.exists()]
    return {path.name: read_index(folder, path.name) for path in paths}


def whole_shards(folder: Path, found: dict[str, Index], own: str = WHOLE) -> dict[str, Shard]:
    """Shards of which some index tells and both files are there in their sizes, by name.

    Where indexes differ about a shard, the one called `own` is right; without its word the shard counts as missing.
    """
    told: dict[str, set[Shard]] = {}
    for index in found.values():
        for shard in index.shards:
            told.setdefault(shard.name, set()).add(shard)
    shards = {name: next(iter(those)) for name, those in told.items() if len(those) == 1}
    if own in found:
        shards |= {shard.name: shard for shard in found[own].shards}
    return {name: shard for name, shard in shards.items() if _has_its_size(folder, shard)}


def _has_its_size(folder: Path, shard: Shard) -> bool:
    files = ((folder / shard.name, shard.bytes), (folder / sidecar(shard.name), shard.sidecar_bytes))
    return all(path.exists() and path.stat().st_size == size for path, size in files)


def listing(index: Index, shards: Iterable[Shard]) -> Index:
    """An index like `index` of these shards."""
    ordered = tuple(sorted(shards, key=lambda shard: shard.first))
    index = dataclasses.replace(index, shards=ordered, displacement_mean=None)
    if index.complete:
        mean = sum(shard.displacement_mean * shard.count for shard in ordered) / index.count
        index = dataclasses.replace(index, displacement_mean=mean)
    return index


def complete(folder: Path, part: Part) -> Index | None:
    """Write index.json once all shards of a folder are there; returns it, or None while some are missing.

    With `Part()`, a writer of everything, the indexes of parts go then.

    Writers may do so at the same time: what they write is the same, each under a temporary name of its own. The last
    of them to finish sees the indexes of all, so one of them does.
    """
    if not (found := indexes(folder)):
        return None
    index = listing(next(iter(found.values())), whole_shards(folder, found, part.index_name).values())
    if not index.complete:
        return None
    if found.get(WHOLE) != index:
        write_index(folder, index, WHOLE, by=part.mark)
    if part.count == 1:
        remove_part_indexes(folder)
    return index


def remove_part_indexes(folder: Path) -> None:
    """Remove what index.json repeats, for those who know that no writer of a part is still at work."""
    for path in folder.glob(PARTS):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, part: Part) -> None:
    """Remove the half-written files of a killed run of this writer; those of others may be in use."""
    for path in folder.glob(".*.incomplete"):
        name = path.name.removeprefix(".").removesuffix(".incomplete")
        if part.count == 1 or name.endswith((part.mark, part.index_name)) or _is_shard(name) and part.owns(name):
            path.unlink(missing_ok=True)


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith((".tar", ".safetensors"))


def strangers(folder: Path, shards: Iterable[Shard]) -> list[str]:
    """Names of a folder's files that pass for a shard's and belong to none of these."""
    known = {name for shard in shards for name in (shard.name, sidecar(shard.name))}
    return sorted(path.name for path in folder.glob("shard-*") if _is_shard(path.name) and path.name not in known)


def require_same(folder: Path, index: Index, identity: dict, **fields: int | str) -> None:
    """Compare an index with the identity (plain JSON values) and other fields that are wanted.

    Raises:
        UsageError: they differ; the message says in what.
    """
    there = {**index.identity, **{name: getattr(index, name) for name in fields}}
    if found := differences(there, {**identity, **fields}):
        raise UsageError(f"{folder} holds other pairs: {', '.join(found)}: use another --out, or delete that folder")
