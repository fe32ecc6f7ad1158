"""What a folder of pairs holds: pixels, names, tar members and index.json.

    index.json
    shard-000000.tar          KEY.anchor.png, KEY.positive.png, KEY.json for each pair, KEY = its index in 8 digits
                              (.jpg or .raw in place of .png: see pairs.codecs)
    shard-000000.safetensors  z and z_positive, float32 [n, L]

A shard is plain WebDataset; its bytes depend on the pairs alone (no times, no owners).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import mmap
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from copgen_fast.config import Codec
from copgen_fast.errors import CorruptArtifactError, NonFiniteError, UsageError
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.pairs.codecs import CODECS, REMEDY
from copgen_fast.runtime import artifacts

FORMAT = 2
"""2 names the codec; folders of 1 hold PNG files and are read too."""
WHOLE = "index.json"
PARTS = "index.part-*-of-*.json"
"""What writers of a part each list theirs in, see `pairs.parts`."""
_BLOCK = tarfile.BLOCKSIZE


def to_uint8(images: Tensor, name: str = "images", first: int = 0) -> Tensor:
    """Quantise as the reference does: floor(clip((x + 1) / 2 * 256, 0, 255)).

    Args:
        images: floating point [N, 3, H, W] in [-1, 1]; values outside are clipped.
        name: what the images are, for the message.
        first: number of the first sample, for the message.

    Returns:
        uint8 [N, 3, H, W] on the same device.

    Raises:
        NonFiniteError: a NaN or an infinity.
        TypeError, ValueError: no such tensor.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    require_finite(name, images, first)
    return levels(images).to(torch.uint8)


def levels(images: Tensor) -> Tensor:
    """What `to_uint8` truncates, float32 of the same shape: 128 at once is exactly / 2 * 256."""
    return (images.float() + 1).mul_(128).clamp_(0, 255)


def finite(values: Tensor) -> Tensor:
    """Which rows of [N, ...] hold no NaN or infinity, bool [N]: the largest magnitude tells, in a third of the time."""
    return torch.linalg.vector_norm(values, float("inf"), dim=tuple(range(1, values.ndim))).isfinite()


def require_finite(name: str, values: Tensor, first: int = 0) -> None:
    """Check values [N, ...], of which row 0 is sample `first`.

    Raises:
        NonFiniteError: a NaN or an infinity; the message names the tensor and the first such sample.
    """
    refuse_non_finite(name, finite(values), first)


def refuse_non_finite(name: str, sound: Tensor, first: int) -> None:
    """`require_finite` for what is known already: bool [N], whether each sample is finite."""
    if not bool(sound.all()):
        raise NonFiniteError(f"{name}: NaN or infinity in sample {first + int(sound.int().argmin())}")


def members(codec: Codec) -> tuple[str, str, str]:
    """What a pair's members are called behind its key: anchor, positive, record."""
    extension = CODECS[codec].extension
    return f"anchor.{extension}", f"positive.{extension}", "json"


def key(index: int) -> str:
    """Key of pair `index`: the part of its members' names up to the first dot."""
    return f"{index:08d}"


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file whose header holds nothing but its name and size (TarInfo's mode is 0644, its time 0)."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def member_table(path: Path, first: int, count: int, codec: Codec, data: bytes | None = None) -> np.ndarray:
    """Where the members of a shard lie: int64 [count, 3, 2], (offset, size) in the order of `members(codec)`.

    Reads the headers itself: tarfile needs 50 us for each, this 2 us.

    Args:
        data: the shard's bytes, where they are in memory already.

    Raises:
        CorruptArtifactError: not the members of pairs first .. first + count - 1.
    """
    names = members(codec)
    table = np.empty((count, len(names), 2), np.int64)
    offset = 0
    try:
        with _mapped(path) if data is None else contextlib.nullcontext(data) as tar:
            for row, column in np.ndindex(count, len(names)):
                name = f"{key(first + row)}.{names[column]}"
                header = tar[offset : offset + _BLOCK]
                if header[:100].rstrip(b"\0") != name.encode():
                    raise ValueError(f"no {name}")
                size = int(header[124:135], 8)
                table[row, column] = offset + _BLOCK, size
                offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    except ValueError as error:  # mmap's and int's too
        raise CorruptArtifactError(f"{path} is truncated or altered ({error} at byte {offset}): {REMEDY}") from error
    return table


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Span(NamedTuple):
    """Which pairs a shard holds."""

    name: str
    first: int
    count: int


def plan(count: int, shard_size: int) -> list[Span]:
    """All shards of `count` pairs; the last may be shorter."""
    return [
        Span(f"shard-{number:06d}.tar", first, min(shard_size, count - first))
        for number, first in enumerate(range(0, count, shard_size))
    ]


@dataclass(frozen=True)
class Shard:
    """A finished shard, as index.json lists it."""

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
    """Name of the file of latents beside shard `name`."""
    return name.removesuffix(".tar") + ".safetensors"


@dataclass(frozen=True)
class Index:
    """Contents of index.json. `displacement_mean` is None until all shards are there."""

    identity: dict
    """What made the pairs, as plain JSON values."""
    count: int
    shard_size: int
    image_shape: tuple[int, int, int]
    latent_dim: int
    codec: Codec
    shards: tuple[Shard, ...]
    displacement_mean: float | None = None

    @property
    def complete(self) -> bool:
        return sum(shard.count for shard in self.shards) == self.count


def write_index(folder: Path, index: Index, name: str = WHOLE, by: str = "") -> None:
    """Write an index; `by` tells apart those who may write it at the same time."""
    artifacts.write_json(folder / name, {"format": FORMAT, **dataclasses.asdict(index)}, by)


def read_index(folder: Path, name: str = WHOLE) -> Index:
    """Read an index of a folder that may still lack shards.

    Raises:
        UsageError: there is none, or another version wrote it.
        CorruptArtifactError: it is no index of pairs.
    """
    path = artifacts.require(folder / name, "pairs")
    values = artifacts.read_json(path)
    try:
        written_by = values.pop("format")
        if written_by == 1:
            values["codec"] = "png"
        elif written_by != FORMAT:
            raise UsageError(
                f"{path} has another format than {FORMAT}: use the version that wrote it, or another --out"
            )
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        index = Index(**values | {"image_shape": tuple(values["image_shape"])}, shards=shards)
        if index.codec not in CODECS:
            raise ValueError(f"codec {index.codec!r}")
        spans = [Span(shard.name, shard.first, shard.count) for shard in shards]
        if spans != [span for span in plan(index.count, index.shard_size) if span in set(spans)]:
            raise ValueError("shards that don't fit count and shard_size")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(f"{path} is no index of pairs ({error}): {REMEDY}") from error
    return index


def read_complete_index(folder: Path) -> Index:
    """Read index.json of a folder that must hold all its shards.

    Raises:
        UsageError: no index, or shards are missing.
        CorruptArtifactError: the index is altered.
    """
    if not (folder / WHOLE).exists() and (parts := sorted(path.name for path in folder.glob(PARTS))):
        raise UsageError(
            f"{folder} holds parts ({', '.join(parts)}) and no {WHOLE}: once every part is written, "
            f"`python -m copgen_fast.pairs.merge {folder}` makes it"
        )
    index = read_index(folder)
    if not index.complete:
        there, wanted = len(index.shards), len(plan(index.count, index.shard_size))
        raise UsageError(f"{folder} holds {there} of {wanted} shards: run `--stages pairs` on this --out first")
    return index


def check_file(path: Path, size: int, sha256: str) -> None:
    """Compare a file with what the index says of it.

    Raises:
        UsageError: it is missing.
        CorruptArtifactError: it is truncated or altered.
    """
    found = artifacts.require(path, "pairs").stat().st_size
    if found < size:
        raise CorruptArtifactError(f"{path} is truncated ({found} of {size} bytes): {REMEDY}")
    if found > size or artifacts.sha256(path) != sha256:
        raise CorruptArtifactError(f"{path} is altered (its sha256 is not the one in index.json): {REMEDY}")
