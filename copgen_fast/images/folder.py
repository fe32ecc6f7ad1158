"""Image files in class folders, SPLIT/CLASS/FILE; hidden names and files of other kinds are left out and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from copgen_fast.errors import UsageError
from copgen_fast.images.split import ItemSplit, named

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder reads: the same images as elsewhere."""


@dataclass
class Found:
    """How many files of each ending are read and left out, over all splits."""

    read: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def note(self, root: Path) -> str | None:
        """One line about what is left out; None: nothing is."""
        if not self.left_out.total():
            return None
        return f"{root}: left out {_counts(self.left_out)}; read {_counts(self.read)}"


def open_splits(root: Path, names: Sequence[str]) -> tuple[dict[str, ItemSplit], str | None]:
    """The splits `names` of a folder, and one line about what is left out.

    Raises:
        UsageError: a folder is missing, or there are no images in it.
    """
    found = Found()
    lying = named(root, names, lambda name: (root / name).is_dir())
    return {name: _open_split(root / own, found) for name, own in lying.items()}, found.note(root)


def _open_split(folder: Path, found: Found) -> ItemSplit:
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing: put images there as {folder.name}/CLASS/FILE")
    items, classes = class_items(folder, found)
    return ItemSplit(items, torch.tensor([label for _, label in items]), str(folder), classes)


def class_items(
    folder: Path, found: Found, without: Sequence[str] = ()
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """(path, label) of the images in class folders, sorted by class and name, and the names of the classes.

    Args:
        found: counts what is read and left out.
        without: class folders that are not looked into.

    Raises:
        UsageError: there are no class folders, or one has no images.
    """
    items: list[tuple[str, int]] = []
    classes = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name in without:
            continue
        if _hidden(name):
            found.left_out["hidden"] += 1
        elif not path.is_dir():
            found.left_out["outside class folders"] += 1
        else:
            paths = list(_images(path, found))
            if not paths:
                raise UsageError(
                    f"{path} holds no images ({', '.join(ENDINGS)}), and every class needs some: add some, or remove it"
                )
            items += ((file, len(classes)) for file in paths)
            classes.append(name)
    if not classes:
        raise UsageError(f"{folder} should hold images as CLASS/FILE, and has no class folders: make some")
    return items, tuple(classes)


def _images(folder: Path, found: Found) -> Iterator[str]:
    """Paths of the images of a class, in the order of torchvision's ImageFolder."""
    walked, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to a folder above it, or to one beside it
            folders.clear()
            continue
        seen.add(real)
        found.left_out["hidden"] += sum(map(_hidden, folders))
        folders[:] = [name for name in folders if not _hidden(name)]
        walked.append((path, names))
    for path, names in sorted(walked):
        for name in sorted(names):
            ending = os.path.splitext(name)[1].lower()
            if _hidden(name):
                found.left_out["hidden"] += 1
            elif ending not in ENDINGS:
                found.left_out[ending or "without an ending"] += 1
            else:
                found.read[ending] += 1
                yield os.path.join(path, name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
