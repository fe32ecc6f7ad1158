"""Pack real images: python -m copgen_fast.images.pack SOURCE OUT [--size 128] [--codec jpeg].

Every image is decoded once, its shorter side resized (bicubic, antialiased) and stored in tar shards; data set `packed`
reads them. SOURCE is a folder of class folders (SPLIT/CLASS/FILE), an .npz file, WebDataset tars made by others, or a
torchvision data set (--name). Running the same command again goes on where it was stopped or killed, and packs shards
that were deleted since.

Threads of one process share the work, as libraries decode, resize and encode outside the interpreter's lock: 0.60 to
0.66 of the CPU time for smooth pictures of 500 x 375 pixels. So they use up to three cores; --part spreads the work
over more, and over hosts, in processes that share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor

from copgen_fast import files
from copgen_fast.config import Codec, DataConfig
from copgen_fast.errors import CorruptArtifactError, UsageError, command
from copgen_fast.images import sets, store, tars
from copgen_fast.images.codecs import CODECS
from copgen_fast.images.split import ItemSplit, Split, UnreadableImageError, names_of
from copgen_fast.images.store import PLACES, Places, StoredShard, StoredSplit, StoreIndex
from copgen_fast.images.views import Whole
from copgen_fast.options import Count, CountOrZero, Range, parse
from copgen_fast.record import differences
from copgen_fast.runtime import artifacts, interrupts
from copgen_fast.runtime.progress import progress
from copgen_fast.runtime.tars import add_member

_AT_ONCE = 16  # images that a thread takes
_SHOWN = 20
SETTINGS = "pack.json"


@dataclass(frozen=True)
class PackConfig:
    """Pack real images into shards."""

    source: Annotated[Path, tyro.conf.Positional]
    """The images: a folder, an .npz file, or the folder of a torchvision data set."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where shards are written; `--data.name packed --data.root OUT` reads them."""
    size: Annotated[int, Range(1, 4096)] = 128
    """Pixels of the shorter sides; smaller images are left as they are."""
    codec: Codec = "jpeg"
    """jpeg: quality 95, colour at full resolution. png: lossless. raw: uncompressed."""
    name: str = "auto"
    """folder, npz, tars or a torchvision data set; auto tells the first three by what SOURCE holds."""
    splits: tuple[str, ...] = sets.SPLITS
    """Splits to pack; `test` is val or validation where SOURCE has no test, as in ImageNet."""
    shard_size: Count = 1000
    """Images of the source in a shard."""
    workers: Count | None = None
    """Threads that decode and encode; None: as many as there are processors."""
    part: CountOrZero = 0
    """This process packs every `parts`-th shard from this one on, so that several processes or hosts share the work."""
    parts: Count = 1


class Packed(NamedTuple):
    """An image as it is stored, or why it could not be decoded."""

    name: str
    data: bytes = b""
    shape: tuple[int, int] = (0, 0)
    label: int = -1
    fault: str | None = None


@dataclass
class ShardPlaces:
    """What a shard's own index collects while it is written."""

    offset: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    shape: list[tuple[int, int]] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    name: bytearray = field(default_factory=bytearray)
    name_end: list[int] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, tar: tarfile.TarFile, number: int, image: Packed, extension: str) -> None:
        """Append an image and its record to the shard."""
        if image.fault is not None:
            self.left_out.append(image.fault)
            return
        self.offset.append(add_member(tar, f"{number:08d}.{extension}", image.data))
        record = {"index": number, "label": image.label, "name": image.name}
        add_member(tar, f"{number:08d}.json", json.dumps(record).encode())
        self.bytes.append(len(image.data))
        self.shape.append(image.shape)
        self.label.append(image.label)
        self.name += os.fsencode(image.name)
        self.name_end.append(len(self.name))

    def tensors(self) -> dict[str, Tensor]:
        """As `store.Places` has them."""
        return {
            "offset": torch.tensor(self.offset, dtype=torch.int64),
            "bytes": torch.tensor(self.bytes, dtype=torch.int32),
            "shape": torch.tensor(self.shape, dtype=torch.int16).reshape(len(self.shape), 2),
            "label": torch.tensor(self.label, dtype=torch.int32),
            "name": torch.tensor(list(self.name), dtype=torch.uint8),
            "name_end": torch.tensor(self.name_end, dtype=torch.int64),
        }


def open_source(config: PackConfig) -> dict[str, Split]:
    """The splits to pack.

    Raises:
        UsageError: SOURCE is missing, or not of a known form.
    """
    name, source = config.name, config.source
    if not source.exists():
        raise UsageError(f"{source} is missing: expected a folder of images or tars, or an .npz file (see --help)")
    if name == "auto":
        if source.suffix == ".npz":
            name = "npz"
        elif all(any(_is_folder(source / own) for own in names_of(split)) for split in config.splits):
            name = "folder"
        elif any(tars.find(source, own) for split in config.splits for own in names_of(split)):
            name = "tars"
        else:
            raise UsageError(
                f"{source} holds no folders or tars of the splits {', '.join(config.splits)}, and is no .npz file: see "
                "--splits, or name a torchvision data set by --name"
            )
    if name == "tars":
        return tars.open_splits(source, config.splits)
    known = [other for other in sets.names() if other not in ("digits", "packed")]
    if name not in known:
        raise UsageError(f"--name {name}: choose from auto, tars, {', '.join(known)}")
    opened = sets.open_set(DataConfig(name, str(source), image_size=config.size), config.splits)
    return dict(opened.splits)


def _is_folder(path: Path) -> bool:
    """Whether it may hold class folders; beside them may lie the archives that they came from."""
    return path.is_dir() and not any(path.glob("*.tar"))


def settings_of(config: PackConfig, splits: dict[str, Split]) -> dict:
    """What decides the shards: settings, and a digest of each split's names and labels."""
    described = {}
    for name, split in splits.items():
        digest = hashlib.sha256()
        if split.labels is not None:
            digest.update(split.labels.numpy().tobytes())
        if isinstance(split, ItemSplit) and isinstance(split.items, list):
            for item, _ in split.items:
                digest.update(os.fsencode(_relative(str(item), config.source)) + b"\0")
        described[name] = {"count": split.count, "sha256": digest.hexdigest()}
    return {"size": config.size, "codec": config.codec, "shard_size": config.shard_size, "splits": described}


def _relative(path: str, root: Path) -> str:
    return path.removeprefix(f"{root}/")


def pack(config: PackConfig) -> StoreIndex | None:
    """Pack the missing shards of this part; returns the index once those of all parts are there, else None.

    Raises:
        UsageError: the source is missing or not as expected, or `out` holds other images.
        CorruptArtifactError: a shard of a finished store is missing, and would be another one now.
        CopgenError: the disk is full; complete shards are kept.
        Interrupted: a stop was requested; complete shards are kept.
    """
    if config.part >= config.parts:
        raise UsageError(f"--part: expected 0 .. {config.parts - 1}, got {config.part}")
    splits = open_source(config)
    by = f".part-{config.part}-of-{config.parts}" if config.parts > 1 else ""
    with artifacts.folder_lock(config.out, by):
        settings = settings_of(config, splits)
        _expect_own(config.out, settings, by)
        shards = {name: _shards(split.count, config.shard_size) for name, split in splits.items()}
        missing = [
            (name, rows, config.out / name / shard)
            for name, found in shards.items()
            for number, (shard, rows) in enumerate(found.items())
            if number % config.parts == config.part and not _finished(config.out / name / shard)
        ]
        finished = store.read_index(config.out) if missing and (config.out / store.INDEX).exists() else None
        _write_shards(config, splits, missing, finished)
        return _write_index(config, settings, splits, shards, by)


def _expect_own(out: Path, settings: dict, by: str) -> None:
    # Listed first: another part may write the record meanwhile.
    others = {item.name for item in out.iterdir() if not item.name.startswith(".")}
    path = out / SETTINGS
    if path.exists():
        there = artifacts.read_record(path)
        if changed := differences(there, settings):
            raise UsageError(f"{out} holds other packed images ({'; '.join(changed[:2])}): choose another OUT")
    elif others:
        raise UsageError(f"{out} is not empty and holds no packed images: choose another OUT")
    else:
        artifacts.write_record(path, settings, by)


def _shards(count: int, size: int) -> dict[str, range]:
    """Names of shards, and the images of the source in each."""
    starts = range(0, count, size)
    return {f"shard-{number:06d}.tar": range(start, min(start + size, count)) for number, start in enumerate(starts)}


def _finished(path: Path) -> bool:
    """Whether a shard is there and whole, by its own index or, in a finished store, by that of all shards."""
    if _own_index(path) is not None:
        return True
    root = path.parent.parent
    if not (root / store.INDEX).exists():
        return False
    stored = {shard.name: shard for shard in store.read_index(root).splits[path.parent.name].shards}
    return path.name in stored and path.exists() and path.stat().st_size == stored[path.name].bytes


def _own_index(path: Path) -> tuple[dict[str, Tensor], dict] | None:
    """A shard's own index, where it and the shard are there and whole."""
    own = path.with_suffix(".safetensors")
    if not (path.exists() and own.exists()):
        return None
    try:
        tensors, record = artifacts.decode_tensors(files.read_bytes(own), own)
        return (tensors, record) if int(record["bytes"]) == path.stat().st_size else None
    except (CorruptArtifactError, UsageError, KeyError):  # UsageError: it was removed meanwhile, see `_write_index`
        return None


def _write_shards(
    config: PackConfig,
    splits: dict[str, Split],
    missing: list[tuple[str, range, Path]],
    finished: StoreIndex | None = None,
) -> None:
    """Pack the missing shards; those of a finished store must be the ones of its index."""
    extension = CODECS[config.codec].extension
    total = sum(len(rows) for _, rows, _ in missing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images are resized side by side, each by its thread
    try:
        with ThreadPoolExecutor(_workers(config)) as pool, progress(total, "pack", "images") as bar:
            chunks = (
                (splits[name], rows[start : start + _AT_ONCE])
                for name, rows, _ in missing
                for start in range(0, len(rows), _AT_ONCE)
            )
            packed = _ahead(pool, chunks, config)
            for name, rows, path in missing:
                places = ShardPlaces()
                with artifacts.atomic(path) as temporary:
                    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                        for start in range(rows.start, rows.stop, _AT_ONCE):
                            images = next(packed)
                            for number, image in enumerate(images, start):
                                places.add(tar, number, image, extension)
                            bar.update(len(images))
                    record = {"bytes": str(temporary.stat().st_size), "digest": files.sha256(temporary)}
                    if finished is None:
                        record["left_out"] = json.dumps(places.left_out)
                        # Before the shard takes its name, so that no shard is ever without it.
                        artifacts.write_tensors(path.with_suffix(".safetensors"), places.tensors(), **record)
                    else:
                        _expect_same(path, record["digest"], finished.splits[name])
    finally:
        torch.set_num_threads(threads)


def _expect_same(path: Path, digest: str, stored: StoredSplit) -> None:
    if digest not in (shard.sha256 for shard in stored.shards if shard.name == path.name):
        raise CorruptArtifactError(
            f"{path}, packed again, is not the one of {store.INDEX}: its images, or the libraries that decode and "
            f"encode, have changed; delete the folder {path.parent.parent} to pack all anew"
        )


def _workers(config: PackConfig) -> int:
    return config.workers or os.cpu_count() or 1


def _ahead(
    pool: ThreadPoolExecutor, chunks: Iterator[tuple[Split, range]], config: PackConfig
) -> Iterator[list[Packed]]:
    """Images of chunks, in order, made in threads a few chunks ahead."""
    pending: deque[Future[list[Packed]]] = deque()
    depth = 2 * _workers(config) + 1
    try:
        for split, rows in chunks:
            pending.append(pool.submit(_encode, split, rows, config))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _encode(split: Split, rows: range, config: PackConfig) -> list[Packed]:
    if interrupts.stop_requested():
        raise interrupts.Interrupted("stopped: complete shards are kept; run the same command to go on")
    view, codec = Whole(config.size), CODECS[config.codec]
    packed = []
    for index in rows:
        name = _relative(split.where(index), config.source) if isinstance(split, ItemSplit) else str(index)
        try:
            image, label = split.read(index, view)
        except UnreadableImageError as error:
            packed.append(Packed(name, fault=str(error.fault)))
            continue
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        packed.append(Packed(name, codec.encode(pixels), pixels.shape[:2], label))
    return packed


def _write_index(
    config: PackConfig, settings: dict, splits: dict[str, Split], shards: dict[str, dict[str, range]], by: str
) -> StoreIndex | None:
    """Join the shards' own indexes, write index.json last and remove them; None while other parts' are missing."""
    out = config.out
    if (out / store.INDEX).exists():
        return store.read_index(out)
    stored = {}
    for name, names in shards.items():
        found = {shard: _own_index(out / name / shard) for shard in names}
        if None in found.values():  # other parts lack some, or one of them has joined and removed all meanwhile
            return store.read_index(out) if (out / store.INDEX).exists() else None
        entries, left_out = [], []
        for shard, (tensors, record) in found.items():
            entries.append(StoredShard(shard, len(tensors["offset"]), int(record["bytes"]), record["digest"]))
            left_out += json.loads(record["left_out"])
        places = Places.join([tensors for tensors, _ in found.values()])
        count = len(places["offset"])
        if not count:
            raise UsageError(f"{config.source}: no {name} image can be decoded: {'; '.join(left_out[:_SHOWN])}")
        data = artifacts.encode_tensors(places, {})
        artifacts.write_bytes(out / name / PLACES, data, by)
        digest = artifacts.tensors_digest(places)
        stored[name] = StoredSplit(count, tuple(entries), digest, splits[name].classes, tuple(left_out))
    index = StoreIndex(config.size, config.codec, stored, settings)
    store.write_index(out, index, by)
    for name, names in shards.items():
        for shard in names:
            (out / name / shard).with_suffix(".safetensors").unlink(missing_ok=True)
    return index


def told(index: StoreIndex) -> list[str]:
    """What was packed and what was left out, a line a split."""
    lines = []
    for name, split in index.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        lines.append(f"{name}: {split.count} images in {len(split.shards)} shards, {size / 1e6:.1f} MB")
        if split.left_out:
            rest = len(split.left_out) - _SHOWN
            shown = "; ".join(split.left_out[:_SHOWN]) + (f"; and {rest} more, see index.json" if rest > 0 else "")
            lines.append(f"{name}: left out {len(split.left_out)} that can't be decoded: {shown}")
    return lines


@command
def main(arguments: list[str] | None = None) -> int:
    """Pack; returns 0, 2 for a fault of usage, 130 when stopped, else 1."""
    config = parse(PackConfig, arguments, "python -m copgen_fast.images.pack")
    with interrupts.handle_signals():
        index = pack(config)
    lines = told(index) if index else [f"part {config.part} of {config.parts} is packed, others are not yet"]
    print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
