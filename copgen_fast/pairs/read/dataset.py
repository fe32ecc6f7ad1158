"""Random access to the pairs of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast import schema
from copgen_fast.config import Codec
from copgen_fast.errors import CorruptItemError, UsageError
from copgen_fast.images.codecs import CODECS, REMEDY, Encoded
from copgen_fast.images.decode import is_small
from copgen_fast.pairs.format import (
    check_file,
    check_size,
    key,
    member_table,
    members,
    plan,
    read_complete_index,
    unlisted_shards,
)
from copgen_fast.runtime.artifacts import require
from copgen_fast.runtime.first_reads import FirstReads

Pair = tuple[Tensor, Tensor, int]
"""Anchor and positive, both uint8 [3, H, W] with any strides, and the label; several positives are [K, 3, H, W]."""


class EncodedPair(NamedTuple):
    """A pair's members, encoded as in the shard."""

    index: int
    images: tuple[memoryview, ...]
    """Of the anchor, then of its positives."""
    record: memoryview


@dataclass(frozen=True)
class PairRecord:
    """KEY.json of a pair; `label` is the class of a conditional generator's images."""

    index: int
    seed: int
    displacement: float
    pseudo_class: int | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 .. 2**32 - 1, got {self.seed}")


class PairDataset(Dataset):
    """The pairs of a folder, in order of their indices.

    Args:
        folder: as `write_pairs` wrote it.
        check: compare every shard's size with the index at once, and its sha256 as it is first read. Otherwise only
            shards that change after they were first read are compared.

    Attributes:
        checks: reads them so.

    Raises:
        UsageError: the index or shards are missing, or the folder holds shards that the index does not list.
        CorruptArtifactError: a shard is truncated or altered, here or as it is read; the message names it.
    """

    def __init__(self, folder: Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = read_complete_index(self.folder)
        self._spans = plan(self.index.count, self.index.shard_size)
        self._folder, self._members = str(self.folder), members(self.index.codec, self.index.positives)
        self._tables: dict[int, np.ndarray] = {}
        shards = [(str(self.folder / shard.name), shard.sha256) for shard in self.index.shards]
        self.checks = FirstReads(shards, self._compare, trusting=not check)
        for shard in self.index.shards:
            path = require(self.folder / shard.name, "pairs")
            if check:
                check_size(path, shard.bytes)
        if unlisted := unlisted_shards(self.folder, self.index.shards):
            raise UsageError(
                f"{self.folder} holds {unlisted[0]}, which index.json does not list: remove it, or use another --out"
            )

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> Pair:
        """Anchor, positive and label of a pair.

        Raises:
            CorruptItemError: it can't be decoded; the message names the shard and the member.
            CopgenError: as for `read`.
        """
        return self.decode(self.read(index))

    def record(self, index: int) -> dict:
        """KEY.json of a pair: index, seed, pseudo_class, displacement, and label if the generator is conditional."""
        return self._parse(self.read(index))

    @property
    def views(self) -> int:
        """Images of a pair."""
        return 1 + self.index.positives

    @property
    def codec(self) -> Codec:
        return self.index.codec

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.index.image_shape

    @property
    def small(self) -> bool:
        """Whether one thread reads its images in less time than two."""
        return is_small(*self.image_shape[1:])

    @property
    def positives(self) -> int:
        """Of each anchor."""
        return self.index.positives

    @property
    def classes(self) -> int:
        """Of the generator; 0: it had none."""
        return self.index.identity.get("classes", 0)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all images when decoded."""
        return (1 + self.index.positives) * self.index.count * int(np.prod(self.index.image_shape))

    def shard_of(self, index: int) -> int:
        """Number of the shard that a pair lies in."""
        return index // self.index.shard_size

    def _compare(self, number: int, data: bytes | None) -> None:
        shard = self.index.shards[number]
        check_file(self.folder / shard.name, shard.bytes, shard.sha256, data)

    def read(self, index: int, shard: bytes | None = None) -> EncodedPair:
        """The encoded pair, from `shard` (its shard's bytes from `read_shard`) or from the file.

        Raises:
            UsageError: its shard is missing, also where it was there before.
            CorruptArtifactError: it is truncated or altered.
        """
        if not 0 <= index < self.index.count:
            raise IndexError(f"index: expected 0 .. {self.index.count - 1}, got {index}")
        number, row = divmod(index, self.index.shard_size)
        if number not in self._tables:
            span = self._spans[number]
            if shard is None:
                self.checks.expect(number)
            self._tables[number] = member_table(
                self.folder / span.name, span.first, span.count, self.index.codec, shard, self.index.positives
            )
        places = self._tables[number][row].tolist()
        start, end = places[0][0], sum(places[-1])
        if shard is None:
            data = memoryview(self.checks.read(number, start, end - start))
        else:
            data = memoryview(shard)[start:end]
        *images, record = (data[offset - start : offset - start + size] for offset, size in places)
        return EncodedPair(index, tuple(images), record)

    def read_shard(self, number: int) -> bytes:
        """A shard's bytes, compared with their digest."""
        return self.checks.read(number)

    def decode(self, pair: EncodedPair) -> Pair:
        """Anchor, positive and label.

        Raises:
            CorruptItemError: the message names the shard and the member.
        """
        codec, shape = CODECS[self.index.codec], self.index.image_shape
        images = (codec.decode(x, shape, self._where(pair.index, column)) for column, x in enumerate(pair.images))
        anchor, *positives = images
        return anchor, positives[0] if len(positives) == 1 else torch.stack(positives), self.label(pair)

    def decode_rows(self, pairs: Sequence[EncodedPair | None], images: np.ndarray, labels: np.ndarray) -> list[int]:
        """Decode pairs into rows of a batch, in less time than one by one.

        Args:
            images: uint8 [1 + K, N, H, W, 3], of the anchors, then of their positives.
            labels: int64 [N].

        Returns:
            the rows of pairs that are None or corrupt: `decode` says what is wrong with these.
        """
        corrupt = set()
        for row, pair in enumerate(pairs):
            try:
                if pair is not None:
                    labels[row] = self.label(pair)
            except CorruptItemError:
                corrupt.add(row)
        for view, rows in enumerate(images):
            files = [b"" if pair is None else pair.images[view] for pair in pairs]
            corrupt.update(CODECS[self.index.codec].decode_rows(files, rows))
        return sorted(corrupt)

    def encoded(self, index: int, shard: bytes | None = None) -> Encoded:
        """A pair for another decoder than `decode`; the sizes that its images claim are checked.

        Raises:
            CorruptItemError: its record or the size of an image is corrupt; the message names the shard and the member.
            CopgenError: as for `read`.
        """
        pair, codec = self.read(index, shard), CODECS[self.index.codec]
        for column, data in enumerate(pair.images):
            codec.expect_size(data, self.index.image_shape, self._where(pair.index, column))
        return Encoded(index, pair.images, self.label(pair))

    def label(self, pair: EncodedPair) -> int:
        """`label` of KEY.json where there is one, else its `pseudo_class`.

        Raises:
            CorruptItemError: there is neither, or the record belongs to another pair.
        """
        record = self._parse(pair)
        if record["index"] != pair.index:
            raise CorruptItemError(f"{self._where(pair.index, -1)} belongs to pair {record['index']}: {REMEDY}")
        label = record.get("label", record.get("pseudo_class"))
        if not isinstance(label, int):
            raise CorruptItemError(f"{self._where(pair.index, -1)} holds no label or pseudo_class: {REMEDY}")
        return label

    def _parse(self, pair: EncodedPair) -> dict:
        try:
            record = schema.parse(bytes(pair.record))
        except ValueError as error:
            message = f"{self._where(pair.index, -1)} is not valid JSON ({error}): {REMEDY}"
            raise CorruptItemError(message) from error
        try:
            schema.check(record, PairRecord)
        except ValueError as error:
            raise CorruptItemError(f"{self._where(pair.index, -1)}: {error}: {REMEDY}") from error
        return record

    def _where(self, index: int, column: int) -> str:
        name = self._spans[index // self.index.shard_size].name
        return f"{self._folder}/{name}: {key(index)}.{self._members[column]}"
