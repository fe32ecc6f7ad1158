"""Data sets that torchvision reads: their classes, the parts that are trained on and tested on, the files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from copgen_fast.errors import UsageError
from copgen_fast.images.split import ItemSplit, Opened


@dataclass(frozen=True)
class TorchvisionSet:
    """A torchvision data set: its class, the arguments of each part, the files it reads.

    Attributes:
        train: of the training part, and of the validation part where there is one, which is trained on as well, as is
            usual in transfer experiments.
    """

    cls: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    files: str


_BOOLEAN = ({"train": True},), ({"train": False},)
_SPLIT = ({"split": "train"},), ({"split": "test"},)
_TRAINVAL = ({"split": "trainval"},), ({"split": "test"},)
_TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"}), ({"split": "test"},)

SETS: dict[str, TorchvisionSet] = {
    "cifar10": TorchvisionSet("CIFAR10", *_BOOLEAN, "cifar-10-batches-py/"),
    "cifar100": TorchvisionSet("CIFAR100", *_BOOLEAN, "cifar-100-python/"),
    "mnist": TorchvisionSet("MNIST", *_BOOLEAN, "MNIST/raw/*-ubyte"),
    "fashionmnist": TorchvisionSet("FashionMNIST", *_BOOLEAN, "FashionMNIST/raw/*-ubyte"),
    "kmnist": TorchvisionSet("KMNIST", *_BOOLEAN, "KMNIST/raw/*-ubyte"),
    "usps": TorchvisionSet("USPS", *_BOOLEAN, "usps.bz2 and usps.t.bz2"),
    "svhn": TorchvisionSet("SVHN", *_SPLIT, "train_32x32.mat and test_32x32.mat"),
    "stl10": TorchvisionSet("STL10", *_SPLIT, "stl10_binary/"),
    "gtsrb": TorchvisionSet("GTSRB", *_SPLIT, "gtsrb/"),
    "food101": TorchvisionSet("Food101", *_SPLIT, "food-101/"),
    "stanfordcars": TorchvisionSet("StanfordCars", *_SPLIT, "stanford_cars/"),
    "oxfordiiitpet": TorchvisionSet("OxfordIIITPet", *_TRAINVAL, "oxford-iiit-pet/"),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", *_TRAIN_AND_VAL, "fgvc-aircraft-2013b/"),
    "flowers102": TorchvisionSet("Flowers102", *_TRAIN_AND_VAL, "flowers-102/"),
    "dtd": TorchvisionSet("DTD", *_TRAIN_AND_VAL, "dtd/"),
}


def open_splits(name: str, root: Path, parts: Sequence[str]) -> Opened:
    """The splits `parts` of a data set.

    Raises:
        UsageError: files are missing or damaged.
    """
    entry, splits, validation = SETS[name], {}, None
    for part in parts:
        datasets = _datasets(entry, root, part)
        labels = [_labels(dataset) for dataset in datasets]
        known = None if any(found is None for found in labels) else torch.cat(labels)
        splits[part] = ItemSplit(ConcatDataset(datasets), known, name)
        if len(datasets) > 1:
            validation = torch.arange(len(datasets[0]), splits[part].count)
    return Opened(splits, validation)


def missing(cls: str, files: str, root: Path) -> str:
    """What to put where, for a data set of torchvision that isn't whole."""
    return (
        f"{root} lacks {files}, or files of it are damaged: put there what "
        f"torchvision.datasets.{cls}({str(root)!r}, download=True) would; nothing is downloaded here"
    )


def _datasets(entry: TorchvisionSet, root: Path, part: str) -> list[Dataset]:
    from torchvision import datasets

    build = getattr(datasets, entry.cls)
    # Paths, where the class takes a loader: they are decoded here, turned as photographs say and bounded.
    options = {"loader": str} if "loader" in inspect.signature(build).parameters else {}
    try:
        return [build(str(root), download=False, **arguments, **options) for arguments in getattr(entry, part)]
    except (RuntimeError, ValueError, EOFError, OSError) as error:  # torchvision's for missing or damaged files
        raise UsageError(missing(entry.cls, entry.files, root)) from error


def _labels(dataset: Dataset) -> Tensor | None:
    """Labels of a data set without reading its images; None: it doesn't tell."""
    if hasattr(dataset, "_samples"):
        return torch.tensor([label for _, label in dataset._samples])
    found = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
    return None if found is None else torch.as_tensor(np.asarray(found, np.int64))
