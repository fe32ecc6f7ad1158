"""Labelled image data sets by name, for evaluations and for pretraining on real images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import archive, folder, store, torchvision_sets, transfer_sets
from copgen_fast.images.split import ArraySplit, Fault, Split, expect_memory
from copgen_fast.images.stream import ImageBatch, in_order, stream
from copgen_fast.images.views import Centre, View
from copgen_fast.ops.checks import expect_tensor

_UINT8 = (torch.uint8,)
_FAULTS_SHOWN = 20
_BATCH = 256  # images streamed at once


@dataclass(frozen=True)
class LabelledImages:
    """The training and test split of a data set.

    Attributes:
        train_images, test_images: uint8 [N, 3, H, W].
        train_labels, test_labels: int64 [N], in 0 .. num_classes - 1; -1 where labels were not requested.
        left_out: how many images could not be decoded.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape; the message names it.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    left_out: int = 0

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = expect_tensor(f"{split}_images", getattr(self, f"{split}_images"), ("N", 3, "H", "W"), _UINT8)
            expect_tensor(f"{split}_labels", getattr(self, f"{split}_labels"), (len(images),), (torch.int64,))

    @property
    def num_classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def names() -> list[str]:
    """Names of the data sets that `load` reads."""
    return ["digits", "npz", "folder", "packed", *sorted({*torchvision_sets.SETS, *transfer_sets.SETS})]


SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class OpenSet:
    """A data set whose images are not decoded yet: what it holds is known, and checked, before they are needed.

    Attributes:
        splits: by name.
        where: path of the data set, for messages.
        validation: which training images are the data set's validation part, int64; None: it names none.
        digest: SHA-256 (hex) of the lists of files, where torchvision gives no split and it is drawn here.
        faults: images that could not be decoded when they were streamed, by where they lie.
    """

    config: DataConfig
    splits: dict[str, Split]
    where: str
    validation: Tensor | None = None
    digest: str | None = None
    faults: dict[str, Fault] = field(default_factory=dict, init=False)

    def stream(self, split: str, view: View, order: Iterable[Tensor] | None = None) -> Iterator[ImageBatch]:
        """Batches of a split's images, decoded in threads (`images.stream.stream`).

        Args:
            view: what is taken of each image.
            order: indices of the images of each batch, int64 [B]; None: all in order. What can't be decoded is left
                out of its batch, and noted in `faults` by where it lies.

        Raises:
            UsageError: an image can't be decoded, and `--data.on-corrupt` is stop.
        """
        part = self.splits[split]
        for batch in stream(part, view, in_order(part.count, _BATCH) if order is None else order):
            new = [fault for fault in batch.faults if fault.where not in self.faults]
            if new and self.config.on_corrupt == "stop":
                raise UsageError(_unreadable(new))
            if new:
                self.faults.update((fault.where, fault) for fault in new)
                warnings.warn(f"left out {len(new)} images of {self.where}: {_shown(new)}", stacklevel=2)
            yield batch

    def readable(self, split: str) -> Tensor:
        """Indices of a split's images, int64, without those that could not be decoded so far."""
        part = self.splits[split]
        if not self.faults:
            return torch.arange(part.count)
        return torch.tensor([index for index in range(part.count) if part.where(index) not in self.faults])

    def expect_classes(self, needed_by: str = "") -> None:
        """Check that labels are 0 .. C - 1, of two classes or more, each with training images.

        Args:
            needed_by: the part that compares classes, for the message.

        Raises:
            UsageError: they are not.
        """
        names = [set(split.classes) for split in self.splits.values() if split.classes]
        if names and (different := set.union(*names) - set.intersection(*names)):
            listed = ", ".join(sorted(different))
            raise UsageError(f"{self.where}: train and test must have the same classes; in one of them only: {listed}")
        if all(split.labels is not None for split in self.splits.values()):
            expect_classes(*(split.labels for split in self.splits.values()), where=self.where, needed_by=needed_by)

    def expect_decodable(self) -> None:
        """Check that the first image of each split can be decoded; if not, look at all.

        Raises:
            UsageError: some can't be, and `--data.on-corrupt` is stop.
        """
        if self.config.on_corrupt == "stop" and any(_faults(split, 1) for split in self.splits.values()):
            raise UsageError(_unreadable([fault for split in self.splits.values() for fault in _faults(split)]))


def open_set(config: DataConfig, splits: Sequence[str] = SPLITS, labelled: bool = True) -> OpenSet:
    """Open the data set `config.name` in `config.root`, without decoding its images; nothing is downloaded.

    Args:
        splits: those that are needed, of `train` and `test`.
        labelled: whether labels are needed, too.

    Raises:
        UsageError: the name is unknown, or files are missing or not as expected.
    """
    root = find(config)
    if root is None:
        return OpenSet(config, {name: split for name, split in _digits().items() if name in splits}, "digits")
    if config.name == "npz":
        return OpenSet(config, archive.open_splits(root, splits, labelled, config.image_size), str(root))
    if config.name == "folder":
        opened, note = folder.open_splits(root, splits)
        if note:
            warnings.warn(note, stacklevel=1)
        return OpenSet(config, opened, str(root))
    if config.name == "packed":
        opened = store.open_splits(root, splits)
        size = min(split.size for split in opened.values())
        if size < config.image_size:
            note = f"{root}: packed at {size} pixels, enlarged to {config.image_size}: pack it at --size"
            warnings.warn(f"{note} {config.image_size} for sharp images", stacklevel=1)
        return OpenSet(config, opened, str(root))
    module = transfer_sets if config.name in transfer_sets.SETS else torchvision_sets
    found = module.open_splits(config.name, root, splits)
    for note in found.notes:
        warnings.warn(note, stacklevel=1)
    return OpenSet(config, found.splits, str(root), found.validation, found.digest)


def load(config: DataConfig, labelled: bool = True) -> LabelledImages:
    """Read both splits of the data set `config.name` from `config.root` into memory; nothing is downloaded.

    Images are returned as uint8 [N, 3, S, S], S = config.image_size: grey is repeated to three channels; the shorter
    side is resized to S (bicubic, antialiased) and the centre cropped.

    Args:
        labelled: whether labels are needed; then they are 0 .. C - 1, C > 1, and every class has training images.

    Raises:
        UsageError: the name is unknown, files are missing or not as expected, the images don't fit into memory, or
            some can't be decoded and `config.on_corrupt` is stop.
    """
    opened = open_set(config, labelled=labelled)
    if labelled:
        opened.expect_classes()
    splits = opened.splits.values()
    count = sum(split.count for split in splits)
    expect_memory(count, config.image_size, sum(split.file_bytes for split in splits))
    (train, train_labels, train_faults), (test, test_labels, test_faults) = (
        _decoded(split, config.image_size) for split in splits
    )
    if faults := train_faults + test_faults:
        if config.on_corrupt == "stop":
            raise UsageError(_unreadable(faults))
        warnings.warn(f"left out {len(faults)} of {count} images of {opened.where}: {_shown(faults)}", stacklevel=1)
    for name, images in (("train", train), ("test", test)):
        if not len(images):
            raise UsageError(f"{opened.where}: no {name} image can be decoded: {_shown(faults)}")
    if labelled:
        expect_classes(train_labels, test_labels, opened.where)
    return LabelledImages(train, train_labels, test, test_labels, len(faults))


def _decoded(split: Split, size: int) -> tuple[Tensor, Tensor, list[Fault]]:
    """All images of a split that can be decoded, uint8 [N, 3, size, size], their labels, and what can't be."""
    images = torch.empty(split.count, 3, size, size, dtype=torch.uint8)
    labels, faults, count = [], [], 0
    for batch in stream(split, Centre(size), in_order(split.count, _BATCH)):
        images[count : count + len(batch.images)] = batch.images
        count += len(batch.images)
        labels.append(batch.labels)
        faults += batch.faults
    return images[:count], torch.cat(labels), faults


def _faults(split: Split, count: int | None = None) -> list[Fault]:
    """What is wrong with the first `count` images of a split, or with all."""
    batches = stream(split, Centre(1), in_order(split.count if count is None else count, _BATCH))
    return [fault for batch in batches for fault in batch.faults]


def find(config: DataConfig) -> Path | None:
    """Path of the data set, without reading it; None for `digits`, which is embedded in scikit-learn.

    Raises:
        UsageError: the name is unknown, or the path is missing or of another kind.
    """
    if config.name not in names():
        raise UsageError(f"unknown data set {config.name!r}: choose from {', '.join(names())}")
    if config.image_size < 1:
        raise UsageError(f"--data.image-size: expected at least 1, got {config.image_size}")
    if config.name == "digits":
        return None
    if config.name == "npz":
        path = _root(config, "an .npz file")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UsageError(f"--data.root {path} is {kind}: data set 'npz' needs the .npz file itself")
        return path
    if config.name == "folder":
        return _root(config, "a folder that holds train/CLASS/* and test/CLASS/*")
    if config.name == "packed":
        return _root(config, "a folder that `python -m copgen_fast.images.pack` wrote")
    known = torchvision_sets.SETS | transfer_sets.SETS
    return _root(config, f"the folder that holds {known[config.name].files}")


def digits(image_size: int = 32) -> LabelledImages:
    """scikit-learn's handwritten digits: 1797 real 8x8 scans with 17 grey levels, ten classes.

    The split is fixed: stratified, 1437 for training and 360 held out. Scans are resized (bicubic) to `image_size`
    and repeated to three channels.
    """
    train, test = _digits().values()
    return LabelledImages(train.load(image_size), train.labels, test.load(image_size), test.labels)


def _digits() -> dict[str, ArraySplit]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    scans, labels = torch.from_numpy(scans), torch.from_numpy(labels).long()
    splits = {}
    for name, rows in zip(SPLITS, map(torch.tensor, indices), strict=True):
        splits[name] = ArraySplit(len(rows), labels[rows], partial(_digit_images, scans[rows]))
    return splits


def _digit_images(scans: Tensor, image_size: int | None) -> Tensor:
    images = scans.float().view(-1, 1, 8, 8) / 16
    images = images if image_size is None else resize(images, image_size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of float images [N, C, H, W] in [0, 1]; the result may overshoot that range."""
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def _root(config: DataConfig, what: str) -> Path:
    if config.root is None:
        raise UsageError(f"data set {config.name!r} needs --data.root: {what} (nothing is downloaded)")
    path = Path(config.root).expanduser()
    if not path.exists():
        raise UsageError(f"--data.root {path} does not exist: data set {config.name!r} needs {what} there")
    return path


def expect_classes(train: Tensor, test: Tensor | None = None, where: str = "", needed_by: str = "") -> None:
    """Check that labels are 0 .. C - 1, of two classes or more, each with training images.

    Args:
        where: the data set, for messages.
        needed_by: the part that compares classes, for messages.

    Raises:
        UsageError: they are not.
    """
    classes, others = train.unique().tolist(), [] if test is None else test.unique().tolist()
    if classes != list(range(len(classes))) or not set(others) <= set(classes):
        raise UsageError(
            f"{where}: labels must be 0 .. C - 1, each with training images; "
            f"training labels are {_listed(classes)}{'' if test is None else f', test labels {_listed(others)}'}"
        )
    if len(classes) < 2:
        raise UsageError(
            f"{where}: {needed_by or 'what compares classes'} needs two classes or more, and all images are of one: "
            "sort them into a folder each, or choose what needs no labels (--probe.evals collapse, --method simclr)"
        )


def _listed(labels: list[int]) -> str:
    return f"{', '.join(map(str, labels[:12]))}{', ...' if len(labels) > 12 else ''}"


def _unreadable(faults: list[Fault]) -> str:
    remedy = "or pass `--data.on-corrupt skip` to go on without"
    if len(faults) == 1:
        return f"{faults[0].remedy}, {remedy}"
    return f"{len(faults)} images cannot be read: {_shown(faults)}: remove or replace them, {remedy}"


def _shown(faults: list[Fault]) -> str:
    rest = len(faults) - _FAULTS_SHOWN
    return "; ".join(map(str, faults[:_FAULTS_SHOWN])) + (f"; and {rest} more" if rest > 0 else "")
