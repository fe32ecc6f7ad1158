"""Labelled image data sets in memory, for evaluations and for pretraining on real images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import archive, folder, torchvision_sets, transfer_sets
from copgen_fast.images.split import ArraySplit, Decoded, Fault, Split, expect_memory
from copgen_fast.images.stream import ImageBatch, in_order, stream
from copgen_fast.images.views import View
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


class RealPairs(Dataset):
    """Real images as pairs: each is its own positive, as in SimCLR.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N], for a supervised loss.
        left_out: how many more could not be decoded.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, left_out: int = 0) -> None:
        self.images = expect_tensor("images", images, ("N", 3, "H", "W"), _UINT8)
        self.labels = labels if labels is None else expect_tensor("labels", labels, (len(images),), (torch.int64,))
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The same image twice, uint8 [3, H, W], and its label, or -1."""
        image = self.images[index]
        return image, image, -1 if self.labels is None else int(self.labels[index])


def names() -> list[str]:
    """Names of the data sets that `load` reads."""
    return ["digits", "npz", "folder", *sorted({*torchvision_sets.SETS, *transfer_sets.SETS})]


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
        """Batches of a split's images, decoded in threads ahead of their use (`images.stream.stream`).

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
        """Check that the images fit into memory and that the first of each split can be decoded; if not, look at all.

        Raises:
            UsageError: they don't, or some can't be and `--data.on-corrupt` is stop.
        """
        self._expect_memory()
        splits = self.splits.values()
        if self.config.on_corrupt == "stop" and any(split.first_fault() for split in splits):
            raise UsageError(_unreadable([fault for split in splits for fault in split.decode(1).faults]))

    def _expect_memory(self) -> None:
        splits = self.splits.values()
        file_bytes = sum(split.file_bytes for split in splits)
        expect_memory(sum(split.count for split in splits), self.config.image_size, file_bytes)

    def decode(self, labelled: bool = True) -> list[Decoded]:
        """All images and labels, split by split.

        Args:
            labelled: whether every class must have an image that can be decoded.

        Raises:
            UsageError: they don't fit into memory, some can't be decoded and `--data.on-corrupt` is stop, or none can.
        """
        self._expect_memory()
        decoded = [split.decode(self.config.image_size) for split in self.splits.values()]
        if faults := [fault for part in decoded for fault in part.faults]:
            if self.config.on_corrupt == "stop":
                raise UsageError(_unreadable(faults))
            count = sum(split.count for split in self.splits.values())
            warnings.warn(f"left out {len(faults)} of {count} images of {self.where}: {_shown(faults)}", stacklevel=1)
        for name, part in zip(self.splits, decoded, strict=True):
            if not len(part.images):
                raise UsageError(f"{self.where}: no {name} image can be decoded: {_shown(part.faults)}")
        if labelled:
            expect_classes(*(part.labels for part in decoded), where=self.where)
        return decoded


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
    train, test = opened.decode(labelled)
    labels = (torch.full((len(part.images),), -1) if part.labels is None else part.labels for part in (train, test))
    train_labels, test_labels = labels
    left_out = len(train.faults) + len(test.faults)
    return LabelledImages(train.images, train_labels, test.images, test_labels, left_out)


def load_train(config: DataConfig, labelled: bool) -> Decoded:
    """As `load`, the training images alone; the test images need not be there, nor labels unless `labelled`."""
    opened = open_set(config, ("train",), labelled)
    if labelled:
        opened.expect_classes()
    return opened.decode(labelled)[0]


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
    known = torchvision_sets.SETS | transfer_sets.SETS
    return _root(config, f"the folder that holds {known[config.name].files}")


def digits(image_size: int = 32) -> LabelledImages:
    """scikit-learn's handwritten digits: 1797 real 8x8 scans with 17 grey levels, ten classes.

    The split is fixed: stratified, 1437 for training and 360 held out. Scans are resized (bicubic) to `image_size`
    and repeated to three channels.
    """
    train, test = (split.decode(image_size) for split in _digits().values())
    return LabelledImages(train.images, train.labels, test.images, test.labels)


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
        return f"{faults[0].where} cannot be read as an image ({faults[0].why}): remove or replace it, {remedy}"
    return f"{len(faults)} images cannot be read: {_shown(faults)}: remove or replace them, {remedy}"


def _shown(faults: list[Fault]) -> str:
    rest = len(faults) - _FAULTS_SHOWN
    return "; ".join(map(str, faults[:_FAULTS_SHOWN])) + (f"; and {rest} more" if rest > 0 else "")
