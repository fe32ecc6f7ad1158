"""Packed images: real images, resized once and stored in shards, read at random by an index of their places.

    index.json                    settings, classes, digests of all files, and what could not be packed
    SPLIT/places.safetensors      of every image where it lies, its size in pixels, label and source name
    SPLIT/shard-000000.tar        KEY.jpg (.png, .raw) and KEY.json of each image, KEY = its number in the source

A shard is plain WebDataset, as those of pairs are. Opening reads the two index files alone.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copgen_fast import files, schema
from copgen_fast.config import Codec
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.images import decode
from copgen_fast.images.split import Fault, UnreadableImageError, named
from copgen_fast.images.views import View
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.first_reads import FirstReads
from copgen_fast.runtime.progress import progress

INDEX, PLACES = "index.json", "places.safetensors"
FORMAT = "copgen_fast packed images 1"
REMEDY = "delete it and pack again"  # of an index, all of them; of a shard, that one
_OF_PLACES = f"delete it and {INDEX} and pack again"
_PILLOW = {"jpeg": "JPEG", "png": "PNG"}


@dataclass(frozen=True)
class StoredShard:
    """A shard's entry in the index."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredSplit:
    """A split's entry in the index.

    Attributes:
        places_sha256: of the tensors in its index of places.
        classes: their names, where the source tells them.
        left_out: images that could not be decoded, and why.
    """

    count: int
    shards: tuple[StoredShard, ...]
    places_sha256: str
    classes: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreIndex:
    """Contents of index.json.

    Attributes:
        size: pixels of the images' shorter sides; smaller images were left as they are.
        identity: of the source, and settings that decide the shards.
    """

    size: int
    codec: Codec
    splits: dict[str, StoredSplit]
    identity: dict


@dataclass(frozen=True, eq=False)
class Places:
    """Where the images of a split lie.

    Attributes:
        offset, bytes: int64 and int32 [N], in its shard.
        shape: height and width, int16 [N, 2].
        label: int32 [N].
        name, name_end: source names in UTF-8, uint8, one after the other, and where each ends, int64 [N].
    """

    offset: np.ndarray
    bytes: np.ndarray
    shape: np.ndarray
    label: np.ndarray
    name: np.ndarray
    name_end: np.ndarray

    def name_of(self, index: int) -> str:
        """Source name of an image."""
        start = int(self.name_end[index - 1]) if index else 0
        return self.name[start : int(self.name_end[index])].tobytes().decode(errors="surrogateescape")

    @staticmethod
    def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One after the other."""
        joined = {place.name: torch.cat([part[place.name] for part in parts]) for place in dataclasses.fields(Places)}
        shifts = accumulate((len(part["name"]) for part in parts), initial=0)
        ends = [part["name_end"] + shift for part, shift in zip(parts, shifts, strict=False)]
        return joined | {"name_end": torch.cat(ends)}


@dataclass(frozen=True, eq=False)
class PackedSplit:
    """The images of one split of a packed data set, read one by one.

    Attributes:
        size: pixels of the images' shorter sides; smaller images were left as they are.
        checks: reads shards, each compared with its digest as it is first read.
        labels: int64 [N].
    """

    folder: Path
    size: int
    codec: Codec
    stored: StoredSplit
    places: Places
    labels: Tensor
    checks: FirstReads
    file_bytes: int = 0
    _firsts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        firsts = [0, *accumulate(shard.count for shard in self.stored.shards)]
        object.__setattr__(self, "_firsts", firsts[:-1])

    @property
    def count(self) -> int:
        return self.stored.count

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.stored.classes

    @property
    def small(self) -> bool:
        """Whether one thread reads its images in less time than two."""
        return decode.is_small(self.size, self.size)

    def shard_of(self, index: int) -> int:
        """Number of the shard that an image lies in."""
        return bisect_right(self._firsts, index) - 1

    def where(self, index: int) -> str:
        """The shard of an image, and its source's name."""
        shard = self.stored.shards[self.shard_of(index)]
        return f"{self.folder / shard.name}: {self.places.name_of(index)}"

    def read(self, index: int, view: View) -> tuple[Tensor, int]:
        """What `view` takes of an image as it is stored, uint8 [3, S, S], and the label.

        Raises:
            UsageError: its shard is missing, also where it was there before.
            CorruptArtifactError: it is truncated or altered.
            UnreadableImageError: the image can't be decoded.
        """
        data = self.file(index)
        try:
            pixels = self._decode(data, self.shape(index))
        except decode.UndecodableImageError as error:
            raise UnreadableImageError(Fault(self.where(index), str(error))) from error
        return view(pixels, index), int(self.places.label[index])

    def file(self, index: int) -> bytes:
        """An image as it is stored, encoded.

        Raises:
            UsageError, CorruptArtifactError: as for `read`.
        """
        place = int(self.places.offset[index]), int(self.places.bytes[index])
        return self.checks.read(self.shard_of(index), *place)

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.places.shape[index].tolist()
        return height, width

    def _decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        if self.codec != "raw":
            return decode.rgb_of_bytes(data, _PILLOW[self.codec], (3, *shape))
        if len(data) != 3 * shape[0] * shape[1]:
            raise decode.UndecodableImageError(f"{len(data)} bytes, {3 * shape[0] * shape[1]} expected")
        return np.frombuffer(bytearray(data), np.uint8).reshape(*shape, 3)


def is_store(root: Path) -> bool:
    """Whether a folder holds packed images."""
    path = root / INDEX
    return path.is_file() and artifacts.read_json(path).get("format") == FORMAT


def read_index(root: Path) -> StoreIndex:
    """Read index.json.

    Raises:
        UsageError: there is none, or not of packed images.
        CorruptArtifactError: it is altered.
    """
    path = root / INDEX
    if not path.exists():
        raise UsageError(f"{path} is missing: `python -m copgen_fast.images.pack SOURCE {root}` packs images there")
    values = artifacts.read_record(path, needed=("format",), remedy=REMEDY)
    if values.pop("format") != FORMAT:
        raise UsageError(f"{path} is no index of packed images of this version: pack them again, or see --data.root")
    try:
        return schema.check(values, StoreIndex)
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: {error}: {REMEDY}") from error


def write_index(root: Path, index: StoreIndex, by: str = "") -> None:
    """Write index.json; `by` names the writer where several may write it at the same time."""
    artifacts.write_record(root / INDEX, {"format": FORMAT, **dataclasses.asdict(index)}, by)


def open_splits(root: Path, names: Sequence[str]) -> dict[str, PackedSplit]:
    """The splits `names` of packed images; no shard is read.

    Raises:
        UsageError: the index, a split or a shard is missing.
        CorruptArtifactError: an index is altered, or a shard is of another size.
    """
    index = read_index(root)
    found = named(root, names, index.splits.__contains__)
    for name in found.values():
        if name not in index.splits:
            raise UsageError(f"{root} has no split {name!r}, only {', '.join(index.splits)}: pack it with --splits")
    return {name: _open_split(root / own, index, index.splits[own]) for name, own in found.items()}


def _open_split(folder: Path, index: StoreIndex, stored: StoredSplit) -> PackedSplit:
    path = folder / PLACES
    places = read_places(path, stored.places_sha256)
    if len(places.offset) != stored.count or sum(shard.count for shard in stored.shards) != stored.count:
        raise CorruptArtifactError(f"{path} and {INDEX} disagree on the number of images: {_OF_PLACES}")
    for shard in stored.shards:
        check_shard(folder / shard.name, shard, with_digest=False)
    checks = FirstReads(
        [(str(folder / shard.name), shard.sha256) for shard in stored.shards], partial(_compare, folder, stored)
    )
    labels = torch.from_numpy(places.label).long()
    return PackedSplit(folder, index.size, index.codec, stored, places, labels, checks)


def _compare(folder: Path, stored: StoredSplit, number: int, data: bytes | None) -> None:
    check_shard(folder / stored.shards[number].name, stored.shards[number])


def read_places(path: Path, digest: str) -> Places:
    """Read an index of places, of this digest of its tensors.

    Raises:
        UsageError: it is missing.
        CorruptArtifactError: it is altered.
    """
    try:
        tensors, record = artifacts.decode_tensors(files.read_bytes(path), path)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{error}: {_OF_PLACES}") from error
    except UsageError as error:
        raise UsageError(f"{error}: put it back, or delete {INDEX} and pack again") from error
    if record.get("sha256") != digest:
        raise CorruptArtifactError(f"{path} is not the one of {INDEX}: {_OF_PLACES}")
    return Places(**{name: tensor.numpy() for name, tensor in tensors.items()})


def check_shard(path: Path, shard: StoredShard, with_digest: bool = True) -> None:
    """Compare a shard's size, and its sha256, with the index.

    Raises:
        UsageError: it is missing.
        CorruptArtifactError: it is truncated or altered.
    """
    try:
        found = files.expect_file(path).stat().st_size
    except UsageError as error:
        raise UsageError(f"{error}: put it back, or pack again") from error
    if found != shard.bytes:
        raise CorruptArtifactError(f"{path} has {found} bytes, {shard.bytes} in {INDEX}: {REMEDY}")
    if with_digest and files.sha256(path) != shard.sha256:
        raise CorruptArtifactError(f"{path} is altered (its sha256 is not the one in {INDEX}): {REMEDY}")


def verify(root: Path) -> int:
    """Compare all shards with their digests; returns how many there are.

    Raises:
        UsageError, CorruptArtifactError: as `open_splits`, and a shard is altered.
    """
    splits = open_splits(root, list(read_index(root).splits))
    shards = [(split.folder / shard.name, shard) for split in splits.values() for shard in split.stored.shards]
    with progress(len(shards), "check", "shards") as bar:
        for path, shard in shards:
            check_shard(path, shard)
            bar.update()
    return len(shards)
