"""Merge the shares of several writers into one data set: python -m copgen_fast.pairs.merge OUT [FROM ...].

Each wrote RUN/pairs/SOURCE with --pairs.part I --pairs.parts N. In a shared folder the last writer to finish does this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from copgen_fast.errors import CorruptArtifactError, UsageError, command
from copgen_fast.options import parse
from copgen_fast.pairs import shares
from copgen_fast.pairs.format import INDEX, Index, Shard, check_shards, plan, sidecar, unlisted_shards, write_index
from copgen_fast.runtime import artifacts

_NAMES_SHOWN = 4


def merge(target: Path, others: Sequence[Path] = ()) -> Index:
    """Check every shard's sha256, link or copy those of `others` into `target`, and write its index.json.

    Files are linked where both folders are on one disk, else copied; `others` are left unchanged.

    Raises:
        UsageError: no indexes, indexes of different pairs, or missing shards; the message names them.
        CorruptArtifactError: a file differs from its index, two folders have different shards of one name, or a
            folder has shards that no index lists; the message names them.
    """
    folders = list(dict.fromkeys([Path(target), *map(Path, others)]))
    found = {folder: shares.read_indexes(folder) for folder in folders}
    indexes = [(folder, index) for folder in folders for index in found[folder].values()]
    if not indexes:
        raise UsageError(f"{', '.join(map(str, folders))}: no index of pairs: run `--stages pairs` first")
    first = indexes[0][1]
    fields = ("count", "shard_size", "image_shape", "latent_dim", "codec", "positives")
    for folder, index in indexes:
        shares.require_same(folder, index, first.identity, **{name: getattr(first, name) for name in fields})
    for folder in folders:
        listed = [shard for index in found[folder].values() for shard in index.shards]
        if unlisted := unlisted_shards(folder, listed):
            raise CorruptArtifactError(f"{folder} holds shards that no index lists: {_shown(unlisted)}: delete them")
    located = _locate(indexes, first)
    check_shards(located.values())
    for folder, shard in located.values():
        if folder != folders[0]:
            _link_or_copy(folder / sidecar(shard.name), folders[0])
            _link_or_copy(folder / shard.name, folders[0])
    merged = first.with_shards(shard for _, shard in located.values())
    if found[folders[0]].get(INDEX) != merged:
        write_index(folders[0], merged)
    shares.remove_share_indexes(folders[0])
    return merged


def _locate(indexes: list[tuple[Path, Index]], wanted: Index) -> dict[str, tuple[Path, Shard]]:
    """All shards by name, with the first folder that has each."""
    located: dict[str, tuple[Path, Shard]] = {}
    for folder, index in indexes:
        for shard in index.shards:
            if not (folder / shard.name).exists():
                continue
            other, same = located.setdefault(shard.name, (folder, shard))
            if same != shard:
                raise CorruptArtifactError(
                    f"{other} and {folder} hold different shards {shard.name}: delete one of them, or its index"
                )
    spans = plan(wanted.count, wanted.shard_size)
    if missing := [span.name for span in spans if span.name not in located]:
        raise UsageError(
            f"{len(missing)} of {len(spans)} shards are missing: {_shown(missing)}: run `--stages pairs` "
            "for their part, or name the folder that has them"
        )
    return located


def _shown(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _link_or_copy(source: Path, folder: Path) -> None:
    with artifacts.atomic(folder / source.name) as temporary:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, temporary)
        if not temporary.exists():
            shutil.copyfile(source, temporary)


@dataclass(frozen=True)
class MergeConfig:
    """Check all shards of a data set of pairs that several writers made, and write its index.json."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of pairs (RUN/pairs/SOURCE) that will hold all shards."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders with the other shards, where writers did not share one folder."""


@command
def main(arguments: list[str] | None = None) -> int:
    """Merge; returns 0 on success, 1 where a file is corrupt, 2 for a fault of usage."""
    options = parse(MergeConfig, arguments, "python -m copgen_fast.pairs.merge")
    index = merge(options.out, options.others)
    print(f"{options.out}: {len(index.shards)} shards, {index.count} pairs, as recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
