"""Images in WebDataset tars made by others: members NAME.jpg with NAME.cls, NAME.txt or NAME.json beside them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from copgen_fast.errors import UsageError
from copgen_fast.images.split import ItemSplit, TarMember, named

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json", "txt")
"""Endings of labels, of which the first that a sample has counts."""
_FIELDS = ("label", "cls", "class", "class_id", "target", "class_name")
_LONGEST = 2**20
"""Bytes of the longest label that is read."""

Label = int | str


def find(root: Path, split: str) -> list[Path]:
    """Tars of a split in order of their names: SPLIT/*.tar, or else those that have it in their names."""
    return sorted(root.glob(f"{split}/*.tar")) or sorted(root.glob(f"*{split}*.tar"))


def open_splits(root: Path, names: Sequence[str]) -> dict[str, ItemSplit]:
    """The splits `names` of a folder of tars; their headers are read, and labels.

    Labels are numbers, or names of classes, which are numbered in their order.

    Raises:
        UsageError: a split has no tars, a tar is damaged, an image has no label, or two files have one name.
    """
    found = {}
    for name, own in named(root, names, lambda name: bool(find(root, name))).items():
        tars = find(root, own)
        if not tars:
            raise UsageError(f"{root} holds no tars of split {name!r}: expected {name}/*.tar, or *{name}*.tar")
        found[name] = [sample for tar in tars for sample in _samples(tar)]
        if not found[name]:
            raise UsageError(f"{tars[0]}: no images ({', '.join(IMAGES)}) in it and the other {name} tars")
    labels = {label for samples in found.values() for _, label in samples}
    classes = None
    if not all(isinstance(label, int) for label in labels):
        classes = tuple(sorted(map(str, labels)))
        numbers = {name: number for number, name in enumerate(classes)}
        found = {name: [(item, numbers[str(label)]) for item, label in samples] for name, samples in found.items()}
    return {
        name: ItemSplit(samples, torch.tensor([label for _, label in samples]), str(root), classes)
        for name, samples in found.items()
    }


def _samples(path: Path) -> Iterator[tuple[TarMember, Label]]:
    """Images of a tar and their labels, in order."""
    images: dict[str, TarMember] = {}
    labels: dict[str, dict[str, TarMember]] = {}
    try:
        with tarfile.open(path, "r:", errorlevel=2) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isreg() or base.startswith("."):
                    continue
                key, ending = f"{folder}/{stem}", ending.rpartition(".")[2].lower()
                place = TarMember(str(path), member.name, member.offset_data, member.size)
                kept = images if ending in IMAGES else labels.setdefault(key, {}) if ending in LABELS else {}
                name = key if ending in IMAGES else ending
                if name in kept:
                    raise UsageError(f"{place} comes after {kept[name].name}, of the same sample: keep one of them")
                kept[name] = place
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UsageError(
            f"{path} is truncated or no tar file ({' '.join(str(error).split())}): get it again"
        ) from error
    for key, image in images.items():
        own = labels.get(key, {})
        ending = next((ending for ending in LABELS if ending in own), None)
        if ending is None:
            raise UsageError(f"{image} has no label beside it: expected {key.lstrip('/')}.cls, .json or .txt")
        yield image, _label(own[ending], ending)


def _label(member: TarMember, ending: str) -> Label:
    if member.size > _LONGEST:
        raise UsageError(f"{member} has {member.size} bytes: expected a label")
    text = member.read().decode(errors="replace").strip()
    value: object = text
    if ending == "json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{member} is no valid JSON ({error}): mend it") from error
        if isinstance(value, dict):
            value = next((value[name] for name in _FIELDS if name in value), None)
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
        raise UsageError(
            f"{member} holds no label: expected a number, a name, or JSON with one of {', '.join(_FIELDS)}"
        )
    return value
