"""One part of a data set, training or test: its labels at once, its images when they are needed."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from copgen_fast.errors import UsageError
from copgen_fast.images import decode
from copgen_fast.images.views import Centre, View
from copgen_fast.runtime.memory import available_memory

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True)
class Fault:
    """An image that can't be decoded: where it is, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} ({self.why})"

    @property
    def remedy(self) -> str:
        """What is wrong and what to do, in one line that may go on."""
        return f"{self.where} cannot be read as an image ({self.why}): remove or replace it"


class UnreadableImageError(ValueError):
    """An image that can't be decoded."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class TarMember(NamedTuple):
    """A file in a tar: the tar's path, the file's name (its source's, in packed images), and where its bytes lie."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"

    def read(self) -> bytes:
        with open(self.tar, "rb", buffering=0) as file:
            return os.pread(file.fileno(), self.size, self.offset)


class Split(Protocol):
    """What the parts of a data set have in common.

    Attributes:
        count: of its images.
        labels: int64 [N]; None: there are none, or only reading the images tells them.
        classes: names of the classes, where the files tell them.
        file_bytes: held in memory beside the images that are read.
    """

    count: int
    labels: Tensor | None
    classes: tuple[str, ...] | None
    file_bytes: int

    def read(self, index: int, view: View) -> tuple[Tensor, int]:
        """What `view` takes of an image, and the label, or -1; raises UnreadableImageError."""


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Images that lie in one array.

    Attributes:
        labels: int64 [N]; None: labels were not requested.
        load: returns the images resized to S x S pixels, uint8 [N, 3, S, S]; given None, as they lie.
        file_bytes: held beside the resized images.
    """

    count: int
    labels: Tensor | None
    load: Callable[[int | None], Tensor]
    file_bytes: int = 0
    classes: tuple[str, ...] | None = None
    _kept: dict[int | None, Tensor] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def read(self, index: int, view: View) -> tuple[Tensor, int]:
        """What `view` takes of an image, uint8 [3, S, S], and the label, or -1. All images of the array are kept."""
        label = -1 if self.labels is None else int(self.labels[index])
        if view == Centre(view.size):
            return self._loaded(view.size)[index], label
        return view(self._loaded(None)[index].movedim(0, 2).numpy(), index), label

    def _loaded(self, size: int | None) -> Tensor:
        with self._lock:
            if size not in self._kept:
                self._kept[size] = self.load(size)
            return self._kept[size]


@dataclass(frozen=True, eq=False)
class ItemSplit:
    """Images that are read one by one.

    Attributes:
        items: (path, member of a tar or Pillow image, label) by index.
        labels: int64 [N]; None: only reading the items tells them.
        name: of the data set, for items that have no path.
        classes: names of the classes, where the files tell them.
    """

    items: Sequence[tuple[Any, int]]
    labels: Tensor | None
    name: str
    classes: tuple[str, ...] | None = None
    file_bytes: int = 0

    @property
    def count(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        """The path of an image, or its number where it has none."""
        item = self.items[index][0]
        return f"image {index} of {self.name}" if isinstance(item, Image.Image) else str(item)

    def read(self, index: int, view: View) -> tuple[Tensor, int]:
        """What `view` takes of an image, uint8 [3, S, S], and the label.

        Raises:
            UnreadableImageError: it can't be decoded.
        """
        where = f"image {index} of {self.name}"
        try:
            image, label = self.items[index]
            if isinstance(image, Image.Image):
                return view(decode.to_rgb(image), index), int(label)
            where = str(image)
            with decode.rgb(image.read() if isinstance(image, TarMember) else image) as pixels:
                return view(pixels, index), int(label)
        except _UNREADABLE as error:
            raise UnreadableImageError(Fault(where, decode.reason(error))) from error


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called where it lies, the first that is there: `test`, val or validation where it is test.

    ImageNet's validation images are what is tested on everywhere, as its test images have no labels.
    """
    return ("test", "val", "validation") if split == "test" else (split,)


def named(root: Path, splits: Sequence[str], there: Callable[[str], bool]) -> dict[str, str]:
    """What each of some splits is called in a data set (`names_of`); a warning tells where that is another name.

    Args:
        there: whether the data set has a split of this name.
    """
    found = {}
    for split in splits:
        names = (name for name in names_of(split) if name == split or name not in splits)
        found[split] = next(filter(there, names), split)
        if found[split] != split:
            warnings.warn(f"{root} has no {split}, so {found[split]} is taken as {split}", stacklevel=2)
    return found


def expect_memory(count: int, size: int, file_bytes: int = 0) -> None:
    """Refuse before decoding what would not fit into memory, with `file_bytes` that are held at the same time."""
    needed, free = (3 * count * size**2 + file_bytes) / 1e6, available_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UsageError(
            f"{count} images of {size} px take {needed / 1e3:.3g} GB and {free / 1e3:.3g} GB of memory are free: "
            "lower --data.image-size or take fewer images"
        )


class Opened(NamedTuple):
    """Splits of a data set by name, and what else its files tell.

    Attributes:
        validation: which training images are the data set's validation part, int64; None: it names none.
        digest: SHA-256 (hex) of the lists of files, where the split is drawn here.
        notes: a line each, for the user.
    """

    splits: dict[str, ItemSplit]
    validation: Tensor | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()
