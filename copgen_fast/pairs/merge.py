"""Join the parts of a data set that several processes or hosts wrote: python -m copgen_fast.pairs.merge OUT [FROM ...].

Each wrote RUN/pairs/WAY with --pairs.part I --pairs.parts N. On a shared folder whoever finishes last does this itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError, report
from copgen_fast.pairs import parts
from copgen_fast.pairs.format import WHOLE, Index, Shard, check_file, plan, sidecar, write_index
from copgen_fast.runtime import artifacts

_SHOWN = 4


class _Held(NamedTuple):
    """A shard, and the folder that has it."""

    shard: Shard
    folder: Path


def merge(target: Path, others: Sequence[Path] = ()) -> Index:
    """Check every shard's sha256, bring those of `others` to `target`, and write its index.json.

    Files are linked where both folders are on one disk, else copied; `others` stay as they are.

    Raises:
        UsageError: no indexes, indexes of different pairs, or missing shards; the message names them.
        CorruptArtifactError: a file is not what its index says, two folders have different shards of one name, or a
            folder has shards that no index lists; the message names them.
    """
    folders = list(dict.fromkeys([Path(target), *map(Path, others)]))
    found = {folder: parts.indexes(folder) for folder in folders}
    listed = [(folder, index) for folder in folders for index in found[folder].values()]
    if not listed:
        raise UsageError(f"{', '.join(map(str, folders))}: no index of pairs: run `--stages pairs` first")
    first = listed[0][1]
    same = ("count", "shard_size", "image_shape", "latent_dim", "codec")
    for folder, index in listed:
        parts.require_same(folder, index, first.identity, **{name: getattr(first, name) for name in same})
    for folder in folders:
        shards = [shard for index in found[folder].values() for shard in index.shards]
        if extra := parts.strangers(folder, shards):
            raise CorruptArtifactError(f"{folder} holds shards that no index lists: {_few(extra)}: delete them")
    held = _held(listed, first)
    for shard, folder in held.values():
        check_file(folder / shard.name, shard.bytes, shard.sha256)
        check_file(folder / sidecar(shard.name), shard.sidecar_bytes, shard.sidecar_sha256)
    for shard, folder in held.values():
        if folder != folders[0]:
            _bring(folder / sidecar(shard.name), folders[0])
            _bring(folder / shard.name, folders[0])
    whole = parts.listing(first, (shard for shard, _ in held.values()))
    if found[folders[0]].get(WHOLE) != whole:
        write_index(folders[0], whole)
    parts.remove_part_indexes(folders[0])
    return whole


def _held(listed: list[tuple[Path, Index]], index: Index) -> dict[str, _Held]:
    """Every shard by name, from the first folder that has it."""
    held: dict[str, _Held] = {}
    for folder, part in listed:
        for shard in part.shards:
            if not (folder / shard.name).exists():
                continue
            there = held.setdefault(shard.name, _Held(shard, folder))
            if there.shard != shard:
                raise CorruptArtifactError(
                    f"{there.folder} and {folder} hold different shards {shard.name}: delete one of them, or its index"
                )
    if missing := [span.name for span in plan(index.count, index.shard_size) if span.name not in held]:
        raise UsageError(
            f"{len(missing)} of {len(held) + len(missing)} shards are missing: {_few(missing)}: run `--stages pairs` "
            "for their part, or name the folder that has them"
        )
    return held


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _bring(source: Path, folder: Path) -> None:
    with artifacts.atomic(folder / source.name) as temporary:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, temporary)
        if not temporary.exists():
            shutil.copyfile(source, temporary)


@dataclass(frozen=True)
class MergeConfig:
    """Check all parts of a data set of pairs and write its index.json."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of pairs (RUN/pairs/WAY) that shall hold all of them."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders that have the rest, where parts were written to folders of their own."""


def main(arguments: list[str] | None = None) -> int:
    """Merge; returns 0 when the data set is whole, 1 when a file is at fault, 2 for a fault of usage."""
    options = tyro.cli(MergeConfig, prog="python -m copgen_fast.pairs.merge", args=arguments)
    try:
        index = merge(options.out, options.others)
    except CopgenError as error:
        return report(error)
    print(f"{options.out}: {len(index.shards)} shards, {index.count} pairs, as recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
