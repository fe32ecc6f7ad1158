"""Image sets of transfer experiments: how each is prepared and scored; SUN397 and Caltech-101, which this file splits.

torchvision gives neither of the two a training part, and lists their files unsorted. Here files are sorted by name, and
the parts are drawn by name alone: in each class, in the order of the SHA-256 of "SEED/CLASS/FILE".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from copgen_fast.errors import UsageError
from copgen_fast.images import folder
from copgen_fast.images.split import ItemSplit, Opened
from copgen_fast.images.torchvision_sets import missing

SEED = 0
_BACKGROUND = "BACKGROUND_Google"
_CALTECH_TRAIN = 30  # images a class
_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Rules:
    """How transfer experiments treat a set (VISSL's configurations; Kornblith et al. 2019 for the metric).

    Attributes:
        crop: False: the whole image is resized to a square, whatever its shape, and is not cropped in training either.
        metric: of the tables of others: top-1 over all images, or the mean over classes of each one's top-1.
        merged: whether the validation part is trained on where nothing is chosen by it.
    """

    crop: bool = True
    metric: Literal["top1", "mean_per_class"] = "top1"
    merged: bool = True


_PER_CLASS = Rules(metric="mean_per_class")
_RULES: dict[str, Rules] = {
    "cifar10": Rules(crop=False),
    "cifar100": Rules(crop=False),
    "sun397": Rules(crop=False, merged=False),
    "sun397-01": Rules(crop=False),
    "oxfordiiitpet": _PER_CLASS,
    "caltech101": _PER_CLASS,
    "caltech101-background": _PER_CLASS,
    "flowers102": _PER_CLASS,
    "fgvcaircraft": _PER_CLASS,
}


def rules(name: str) -> Rules:
    """The rules of a data set; those of any other are the defaults."""
    return _RULES.get(name, Rules())


@dataclass(frozen=True)
class TransferSet:
    """A set that is split here.

    Attributes:
        cls: torchvision's class, which can download it.
        files: what its root holds.
        digest: `digest` that the parts of the published files should have; None: not known here.
    """

    cls: str
    files: str
    digest: str | None = None


_CALTECH = "Caltech101", "caltech101/101_ObjectCategories/"
_SUN = "SUN397", "SUN397/"
# No copy of the sets was read. Caltech-101: of the known numbers of its classes' images, which are numbered from 1; the
# lists of Ericsson et al. (2021, github.com/linusericsson/ssl-transfer) have as many names, of the same length in all.
# SUN397: of the 108,753 names that TensorFlow Datasets 4.9.10 lists, and the one image that it leaves out.
SETS: dict[str, TransferSet] = {
    "caltech101": TransferSet(*_CALTECH, "f87849ca2e8d3666abb7be2ffa9f17377aba1e8f6b92f92e682e19538a079f73"),
    "caltech101-background": TransferSet(*_CALTECH, "2a0933f715d4cfbfd5f52c3827f75022780c2643d26fdbcc597a0e5abb97f135"),
    "sun397": TransferSet(*_SUN, "c2ab0b36a9c6a5b68d0829c4ff290fdf4380431ae25f1624458bc41e52584c07"),
    "sun397-01": TransferSet(*_SUN),
}


def open_splits(name: str, root: Path, parts: Sequence[str]) -> Opened:
    """The splits `parts` of a data set.

    Raises:
        UsageError: files are missing, or too few of a class.
    """
    entry = SETS[name]
    base = root / entry.files
    needed = f"{entry.files}{_BACKGROUND}/" if name.endswith("background") else entry.files
    if not (root / needed).is_dir():
        raise UsageError(missing(entry.cls, needed, root))
    notes = []
    if entry.cls == "Caltech101":
        found = folder.Found()
        items, classes = folder.class_items(base, found, () if name.endswith("background") else (_BACKGROUND,))
        if note := found.note(base):
            notes.append(note)
    else:
        items, classes = _sun397(base, missing(entry.cls, entry.files, root))
    names = [Path(path).relative_to(base).as_posix() for path, _ in items]
    if name == "sun397-01":
        part_of = _listed(base, names)
    else:
        part_of = draw(names, [label for _, label in items], classes, entry.cls)
    rows = {part: [row for row, of in enumerate(part_of) if of == part] for part in _PARTS}
    sha = digest(names, part_of)
    if entry.digest not in (None, sha):
        notes.append(
            f"{base}: {len(names)} images whose split has the digest {sha[:12]}, and {entry.digest[:12]} is "
            "expected of the published files: where some are missing, accuracies are not comparable with those on all"
        )
    splits, validation = {}, None
    for part in parts:
        chosen = rows[part] + (rows["val"] if part == "train" else [])
        kept = [items[row] for row in chosen]
        splits[part] = ItemSplit(kept, torch.tensor([label for _, label in kept]), str(base), classes)
        if part == "train" and rows["val"]:
            validation = torch.arange(len(rows["train"]), len(chosen))
    return Opened(splits, validation, sha, tuple(notes))


def draw(names: Sequence[str], labels: Sequence[int], classes: Sequence[str], cls: str, seed: int = SEED) -> list[str]:
    """The part of each file, `train`, `val` or `test`: a function of names and seed alone.

    Caltech-101: 30 images a class are trained on, all others tested on. SUN397: of n images a class 7 n / 10, rounded
    down, are trained on, n / 10, rounded down, are the validation part, all others are tested on.

    Args:
        names: CLASS/FILE.
        labels: of the files, as indices of `classes`.
        cls: `Caltech101` or `SUN397`.

    Raises:
        UsageError: a class has too few images for its parts.
    """
    members: dict[int, list[int]] = {label: [] for label in range(len(classes))}
    for row, label in enumerate(labels):
        members[label].append(row)
    parts = ["test"] * len(names)
    for label, rows in members.items():
        count = len(rows)
        train, val = (_CALTECH_TRAIN, 0) if cls == "Caltech101" else (7 * count // 10, count // 10)
        if not 0 < train < count:
            raise UsageError(
                f"class {classes[label]} has {count} images, and {cls} trains on {max(train, 1)} of a class and tests "
                "on others: files are missing"
            )
        rows = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{names[row]}".encode()).digest())
        for place, row in enumerate(rows[: train + val]):
            parts[row] = "train" if place < train else "val"
    return parts


def digest(names: Sequence[str], parts: Sequence[str]) -> str:
    """SHA-256 (hex) of the lines "PART CLASS/FILE", sorted by file."""
    lines = sorted(zip(names, parts, strict=True))
    return hashlib.sha256("".join(f"{part} {name}\n" for name, part in lines).encode()).hexdigest()


def _sun397(base: Path, remedy: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Files sorted by name, and classes as "abbey" or "bakery/shop": the path without the letter."""
    try:
        lines = (base / "ClassName.txt").read_text().split()
    except OSError as error:
        raise UsageError(remedy) from error
    classes = tuple(line[3:] for line in lines)
    label_of = {name: label for label, name in enumerate(classes)}
    items = []
    for path in sorted(base.rglob("sun_*.jpg"), key=lambda path: path.relative_to(base).as_posix()):
        name = "/".join(path.relative_to(base).parts[1:-1])
        if name not in label_of:
            raise UsageError(f"{path} is of no class in {base / 'ClassName.txt'}: remove it")
        items.append((str(path), label_of[name]))
    return items, classes


def _listed(base: Path, names: Sequence[str]) -> list[str]:
    """The part of each file by SUN397's first official partition; those in neither list are left out.

    Raises:
        UsageError: a list is missing, or names a file that is.
    """
    parts: dict[str, str] = {}
    for part, name in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        places = [base / name, base / "Partitions" / name, base.parent / "Partitions" / name]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise UsageError(f"{places[0]} is missing: unpack SUN397's Partitions there, or take --data.name sun397")
        listed = [line.strip("/") for line in path.read_text().split()]
        if absent := set(listed) - set(names):
            raise UsageError(f"{path} names {len(absent)} missing files, such as {base / min(absent)}: add them")
        parts |= dict.fromkeys(listed, part)
    return [parts.get(name, "") for name in names]
