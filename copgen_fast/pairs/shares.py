"""Several writers of one data set: each one's share of the shards, and the indexes that they leave.

Writers need no coordination. Writer I of N makes the shards whose number modulo N is I, in a folder that all use or in
one for itself, and lists them in index.part-I-of-N.json. A writer that finds all shards listed writes index.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from copgen_fast.errors import UsageError
from copgen_fast.pairs.format import (
    INDEX,
    SHARE_INDEXES,
    Index,
    Shard,
    Span,
    is_shard,
    plan,
    read_index,
    sidecar,
    write_index,
)
from copgen_fast.record import differences


class Share(NamedTuple):
    """The shards of writer `number` of `count` (--pairs.part, --pairs.parts)."""

    number: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """Ends the names of the writer's files; empty for the only writer."""
        return f".part-{self.number}-of-{self.count}" if self.count > 1 else ""

    @property
    def index_name(self) -> str:
        return f"index{self.suffix}.json"

    def owns(self, shard: str) -> bool:
        """Whether the shard of that name is in the share."""
        return int(shard.removeprefix("shard-").partition(".")[0]) % self.count == self.number

    def spans(self, count: int, shard_size: int) -> list[Span]:
        """The share of the shards of `count` pairs."""
        return [span for span in plan(count, shard_size) if self.owns(span.name)]


def read_indexes(folder: Path) -> dict[str, Index]:
    """All indexes of a folder by file name.

    Raises:
        UsageError, CorruptArtifactError: see `format.read_index`.
    """
    paths = [path for path in (folder / INDEX, *sorted(folder.glob(SHARE_INDEXES))) if path.exists()]
    return {path.name: read_index(folder, path.name) for path in paths}


def finished_shards(folder: Path, indexes: dict[str, Index], own: str = INDEX) -> dict[str, Shard]:
    """Shards that are listed and whose files are there, of the right sizes, by name.

    Where indexes disagree on a shard, the one called `own` is right; a shard not listed there counts as missing.
    """
    entries: dict[str, set[Shard]] = {}
    for index in indexes.values():
        for shard in index.shards:
            entries.setdefault(shard.name, set()).add(shard)
    shards = {name: next(iter(found)) for name, found in entries.items() if len(found) == 1}
    if own in indexes:
        shards |= {shard.name: shard for shard in indexes[own].shards}
    return {name: shard for name, shard in shards.items() if _has_its_size(folder, shard)}


def _has_its_size(folder: Path, shard: Shard) -> bool:
    files = ((folder / shard.name, shard.bytes), (folder / sidecar(shard.name), shard.sidecar_bytes))
    return all(path.exists() and path.stat().st_size == size for path, size in files)


def complete_index(folder: Path, share: Share) -> Index | None:
    """Write index.json if all shards are there, and return it; None while some are missing.

    `Share()`, the only writer, then removes the indexes of shares.

    Writers may do so at the same time: what they write is the same, each under another temporary name. The last to
    finish sees all indexes, so at least one of them succeeds.
    """
    if not (indexes := read_indexes(folder)):
        return None
    index = next(iter(indexes.values())).with_shards(finished_shards(folder, indexes, share.index_name).values())
    if not index.complete:
        return None
    if indexes.get(INDEX) != index:
        write_index(folder, index, by=share.suffix)
    if share.count == 1:
        remove_share_indexes(folder)
    return index


def remove_share_indexes(folder: Path) -> None:
    """Remove the indexes that index.json replaces; only while no other writer is at work."""
    for path in folder.glob(SHARE_INDEXES):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, share: Share) -> None:
    """Remove the half-written files of a killed run of this writer; those of others may be in use."""
    for path in folder.glob(".*.incomplete"):
        name = path.name.removeprefix(".").removesuffix(".incomplete")
        if share.count == 1 or name.endswith((share.suffix, share.index_name)) or is_shard(name) and share.owns(name):
            path.unlink(missing_ok=True)


def require_same(folder: Path, index: Index, identity: dict, **fields: int | str) -> None:
    """Check that an index has this identity (plain JSON values) and these other fields.

    Raises:
        UsageError: it differs; the message says where.
    """
    found = {**index.identity, **{name: getattr(index, name) for name in fields}}
    if changes := differences(found, {**identity, **fields}):
        raise UsageError(f"{folder} holds other pairs: {', '.join(changes)}: use another --out, or delete that folder")
