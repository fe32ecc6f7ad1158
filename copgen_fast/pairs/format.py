"""On-disk format of a folder of pairs: pixels, file names, tar members and index.json.

    index.json
    shard-000000.tar          KEY.anchor.png, KEY.positive.png, KEY.json for each pair, KEY = its index in 8 digits
                              (.jpg or .raw in place of .png: see `images.codecs`)
    shard-000000.safetensors  z and z_positive, float32 [n, L]

With K > 1 positives of each anchor the others are KEY.positive2.png ... KEY.positiveK.png, and z_positive is [n, K, L].
A shard is plain WebDataset; its bytes depend on the pairs alone (no times, no owners).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import mmap
import tarfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from copgen_fast import files, schema
from copgen_fast.config import Codec
from copgen_fast.errors import CopgenError, CorruptArtifactError, NonFiniteError, UsageError
from copgen_fast.images.codecs import CODECS, REMEDY
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.progress import progress

FORMAT, SEVERAL = 2, 3
"""Versions in index.json. 2 records the codec; folders of version 1 hold PNG files and are read too. 3 is that
of folders with several positives of each anchor."""
INDEX = "index.json"
SHARE_INDEXES = "index.part-*-of-*.json"
"""Pattern of the indexes of several writers, see `pairs.shares`."""
_BLOCK = tarfile.BLOCKSIZE
_MOST_SHARDS, _LARGEST_SIDE = 10**6, 2**14


def to_uint8(images: Tensor, name: str = "images", first: int = 0) -> Tensor:
    """Quantise as the reference code does: floor(clip((x + 1) / 2 * 256, 0, 255)).

    Args:
        images: floating point [N, 3, H, W] in [-1, 1]; values outside are clipped.
        name: of the images, for the message.
        first: number of the first sample, for the message.

    Returns:
        uint8 [N, 3, H, W] on the same device.

    Raises:
        NonFiniteError: a NaN or an infinity.
        TypeError, ValueError: another dtype or shape.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    require_finite(name, images, first)
    return levels(images).to(torch.uint8)


def levels(images: Tensor) -> Tensor:
    """The levels that `to_uint8` truncates, float32 of the same shape (x 128 is exactly / 2 * 256)."""
    return (images.float() + 1).mul_(128).clamp_(0, 255)


def magnitudes(values: Tensor) -> Tensor:
    """Largest magnitude of each row of [N, ...], [N]: 3x faster to look at for NaN than isfinite().all()."""
    return torch.linalg.vector_norm(values, float("inf"), dim=tuple(range(1, values.ndim)))


def require_finite(name: str, values: Tensor, first: int | Sequence[int] = 0) -> None:
    """Check that values [N, ...] are finite; row 0 is sample `first`, or rows are the samples of these numbers.

    Raises:
        NonFiniteError: a NaN or an infinity; the message names the tensor and the first such sample.
    """
    require(name, magnitudes(values), first)


def require(name: str, largest: Tensor, first: int | Sequence[int], most: float | None = None) -> None:
    """`require_finite` of the result of `magnitudes`; with `most`, CopgenError for values far out of range."""
    numbers = range(first, first + len(largest)) if isinstance(first, int) else first
    for number, value in zip(numbers, largest.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"{name}: NaN or infinity in sample {number}")
        if most is not None and value > most:
            message = f"{name}: expected values in [-1, 1], got some of magnitude {value:.4g} in sample {number}"
            raise CopgenError(f"{message}: scale them, or clamp them if they overshoot")


def members(codec: Codec, positives: int = 1) -> tuple[str, ...]:
    """Names of a pair's tar members after its key: anchor, positives, record."""
    extension = CODECS[codec].extension
    more = (f"positive{number}.{extension}" for number in range(2, positives + 1))
    return f"anchor.{extension}", f"positive.{extension}", *more, "json"


def key(index: int) -> str:
    """Key of pair `index`: its members' names up to the first dot, as WebDataset has it."""
    return f"{index:08d}"


def member_table(
    path: Path, first: int, count: int, codec: Codec, data: bytes | None = None, positives: int = 1
) -> np.ndarray:
    """Offsets and sizes of a shard's members, int64 [count, 2 + positives, 2], in the order of `members`.

    Reads tar headers without tarfile: 2 us each instead of 50.

    Args:
        data: the shard's bytes, where they are in memory already.

    Raises:
        CorruptArtifactError: the members are not those of pairs first .. first + count - 1.
    """
    names = members(codec, positives)
    table = np.empty((count, len(names), 2), np.int64)
    offset = 0
    try:
        with _map(path) if data is None else contextlib.nullcontext(data) as tar:
            for row, column in np.ndindex(count, len(names)):
                name = f"{key(first + row)}.{names[column]}"
                header = tar[offset : offset + _BLOCK]
                if header[:100].rstrip(b"\0") != name.encode():
                    raise ValueError(f"no {name}")
                size = int(header[124:135], 8)
                if not 0 <= size <= len(tar) - offset - _BLOCK:  # as many bytes would be read
                    raise ValueError(f"{name} claims {size} bytes")
                table[row, column] = offset + _BLOCK, size
                offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    except ValueError as error:  # mmap's and int's too
        raise CorruptArtifactError(f"{path} is truncated or altered ({error} at byte {offset}): {REMEDY}") from error
    return table


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Span(NamedTuple):
    """A shard's name and the range of pairs in it."""

    name: str
    first: int
    count: int


def plan(count: int, shard_size: int) -> list[Span]:
    """Spans of all shards of `count` pairs; the last may be shorter."""
    return [
        Span(f"shard-{number:06d}.tar", first, min(shard_size, count - first))
        for number, first in enumerate(range(0, count, shard_size))
    ]


@dataclass(frozen=True)
class Shard:
    """A finished shard's entry in index.json."""

    name: str
    first: int
    count: int
    bytes: int
    sha256: str
    sidecar_bytes: int
    sidecar_sha256: str
    displacement_mean: float
    """Mean L2 norm of z_positive - z over its pairs."""


def sidecar(name: str) -> str:
    """Name of the file with the latents of shard `name`."""
    return name.removesuffix(".tar") + ".safetensors"


@dataclass(frozen=True)
class Index:
    """Contents of index.json. `displacement_mean` is None until all shards are listed."""

    identity: dict
    """Digests, names and seeds that determine the pairs, as plain JSON values."""
    count: int
    shard_size: int
    image_shape: tuple[int, int, int]
    latent_dim: int
    codec: Codec
    shards: tuple[Shard, ...]
    displacement_mean: float | None = None
    positives: int = 1
    """Of each anchor."""

    @property
    def complete(self) -> bool:
        return sum(shard.count for shard in self.shards) == self.count

    def with_shards(self, shards: Iterable[Shard]) -> Index:
        """The same index listing these shards, in order."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.first))
        index = dataclasses.replace(self, shards=ordered, displacement_mean=None)
        if index.complete:
            mean = sum(shard.displacement_mean * shard.count for shard in ordered) / index.count
            index = dataclasses.replace(index, displacement_mean=mean)
        return index


def write_index(folder: Path, index: Index, name: str = INDEX, by: str = "") -> None:
    """Write an index; `by` names the writer where several may write it at the same time."""
    values = dataclasses.asdict(index)
    version = FORMAT if index.positives == 1 else SEVERAL
    if version == FORMAT:
        del values["positives"]
    artifacts.write_record(folder / name, {"format": version, **values}, by)


def read_index(folder: Path, name: str = INDEX) -> Index:
    """Read an index of a folder that may still lack shards.

    Raises:
        UsageError: it is missing, or of another format version.
        CorruptArtifactError: it is not an index of pairs.
    """
    path = artifacts.require(folder / name, "pairs")
    values = artifacts.read_record(path, needed=("format",), remedy=REMEDY)
    version = values.pop("format")
    if version == 1:
        values["codec"] = "png"
    elif version not in (FORMAT, SEVERAL):
        raise UsageError(f"{path} has another format than {FORMAT}: use the version that wrote it, or another --out")
    try:
        index = schema.check(values, Index)
        _check_sizes(index)
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not an index of pairs ({error}): {REMEDY}") from error
    return index


def _check_sizes(index: Index) -> None:
    """Raises ValueError where numbers of an index don't fit each other."""
    for name in ("count", "shard_size", "latent_dim", "positives"):
        if getattr(index, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(index, name)}")
    if -(-index.count // index.shard_size) > _MOST_SHARDS:
        raise ValueError(f"count: {index.count} pairs in shards of {index.shard_size} are too many shards")
    if index.image_shape[0] != 3 or not all(0 <= size <= _LARGEST_SIDE for size in index.image_shape):
        raise ValueError(f"image_shape: expected (3, height, width), got {index.image_shape}")
    spans = [Span(shard.name, shard.first, shard.count) for shard in index.shards]
    if spans != [span for span in plan(index.count, index.shard_size) if span in set(spans)]:
        raise ValueError("shards that don't fit count and shard_size")


def read_complete_index(folder: Path) -> Index:
    """Read index.json of a folder that must hold all its shards.

    Raises:
        UsageError: the index or shards are missing.
        CorruptArtifactError: the index is altered.
    """
    if not (folder / INDEX).exists() and (found := sorted(path.name for path in folder.glob(SHARE_INDEXES))):
        raise UsageError(
            f"{folder} holds parts ({', '.join(found)}) and no {INDEX}: once every part is written, "
            f"`python -m copgen_fast.pairs.merge {folder}` makes it"
        )
    index = read_index(folder)
    if not index.complete:
        there, wanted = len(index.shards), len(plan(index.count, index.shard_size))
        raise UsageError(f"{folder} holds {there} of {wanted} shards: run `--stages pairs` on this --out first")
    return index


def unlisted_shards(folder: Path, shards: Iterable[Shard]) -> list[str]:
    """Names of shards' files in a folder that belong to none of these shards."""
    listed = {name for shard in shards for name in (shard.name, sidecar(shard.name))}
    return sorted(path.name for path in folder.glob("shard-*") if is_shard(path.name) and path.name not in listed)


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a shard or of its latents."""
    return name.startswith("shard-") and name.endswith((".tar", ".safetensors"))


def check_shards(shards: Collection[tuple[Path, Shard]]) -> None:
    """`check_file` of shards in these folders and of their latents, with progress."""
    with progress(len(shards), "check", "shards") as bar:
        for folder, shard in shards:
            check_file(folder / shard.name, shard.bytes, shard.sha256)
            check_file(folder / sidecar(shard.name), shard.sidecar_bytes, shard.sidecar_sha256)
            bar.update()


def check_file(path: Path, size: int, sha256: str, data: bytes | None = None) -> None:
    """Compare a file's size and sha256 with those in the index.

    Args:
        data: its bytes, where they are in memory already.

    Raises:
        UsageError: it is missing.
        CorruptArtifactError: it is truncated or altered.
    """
    check_size(path, size)
    digest = files.sha256(path) if data is None else hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise CorruptArtifactError(f"{path} is altered (its sha256 is not the one in index.json): {REMEDY}")


def check_size(path: Path, size: int) -> None:
    """`check_file` of the size alone."""
    found = artifacts.require(path, "pairs").stat().st_size
    if found < size:
        raise CorruptArtifactError(f"{path} is truncated ({found} of {size} bytes): {REMEDY}")
    if found > size:
        raise CorruptArtifactError(f"{path} is altered ({found} bytes, {size} in index.json): {REMEDY}")
