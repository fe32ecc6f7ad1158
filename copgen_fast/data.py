"""Labelled image sets for probing and for real-image baselines, in memory as uint8 tensors."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from copgen_fast.checks import expect_tensor
from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError


@dataclass(frozen=True)
class LabelledImages:
    """A data set with its two splits.

    Attributes:
        train_images, test_images: uint8 [N, 3, H, W].
        train_labels, test_labels: int64 [N], in 0 .. num_classes - 1.

    Raises:
        TypeError, ValueError: a tensor of another dtype or shape; the message names it.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = expect_tensor(f"{split}_images", getattr(self, f"{split}_images"), ("N", 3, "H", "W"), _UINT8)
            expect_tensor(f"{split}_labels", getattr(self, f"{split}_labels"), (len(images),), (torch.int64,))

    @property
    def num_classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


_UINT8 = (torch.uint8,)


class RealPairs(Dataset):
    """Real images as pairs: each is its own positive, as in plain SimCLR.

    Args:
        images: uint8 [N, 3, H, W].
    """

    def __init__(self, images: Tensor) -> None:
        self.images = expect_tensor("images", images, ("N", 3, "H", "W"), _UINT8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The same image twice, uint8 [3, H, W]."""
        image = self.images[index]
        return image, image

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all images of all pairs."""
        return 2 * self.images.nbytes


@dataclass(frozen=True)
class _TorchvisionSet:
    """How to ask torchvision for a data set: its class, arguments of each part of the splits, what it reads."""

    cls: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    files: str


_BOOLEAN = ({"train": True},), ({"train": False},)
_SPLIT = ({"split": "train"},), ({"split": "test"},)
_TRAINVAL = ({"split": "trainval"},), ({"split": "test"},)
_TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"}), ({"split": "test"},)

# Where a set has a validation split, it is trained on as well, as is usual in transfer experiments.
_TORCHVISION: dict[str, _TorchvisionSet] = {
    "cifar10": _TorchvisionSet("CIFAR10", *_BOOLEAN, "cifar-10-batches-py/"),
    "cifar100": _TorchvisionSet("CIFAR100", *_BOOLEAN, "cifar-100-python/"),
    "mnist": _TorchvisionSet("MNIST", *_BOOLEAN, "MNIST/raw/*-ubyte"),
    "fashionmnist": _TorchvisionSet("FashionMNIST", *_BOOLEAN, "FashionMNIST/raw/*-ubyte"),
    "kmnist": _TorchvisionSet("KMNIST", *_BOOLEAN, "KMNIST/raw/*-ubyte"),
    "usps": _TorchvisionSet("USPS", *_BOOLEAN, "usps.bz2 and usps.t.bz2"),
    "svhn": _TorchvisionSet("SVHN", *_SPLIT, "train_32x32.mat and test_32x32.mat"),
    "stl10": _TorchvisionSet("STL10", *_SPLIT, "stl10_binary/"),
    "gtsrb": _TorchvisionSet("GTSRB", *_SPLIT, "gtsrb/"),
    "food101": _TorchvisionSet("Food101", *_SPLIT, "food-101/"),
    "stanfordcars": _TorchvisionSet("StanfordCars", *_SPLIT, "stanford_cars/"),
    "oxfordiiitpet": _TorchvisionSet("OxfordIIITPet", *_TRAINVAL, "oxford-iiit-pet/"),
    "fgvcaircraft": _TorchvisionSet("FGVCAircraft", *_TRAINVAL, "fgvc-aircraft-2013b/"),
    "flowers102": _TorchvisionSet("Flowers102", *_TRAIN_AND_VAL, "flowers-102/"),
    "dtd": _TorchvisionSet("DTD", *_TRAIN_AND_VAL, "dtd/"),
}


def names() -> list[str]:
    """Names that `load` knows."""
    return ["digits", "npz", "folder", *sorted(_TORCHVISION)]


def load(config: DataConfig) -> LabelledImages:
    """Read the data set `config.name` from `config.root` into memory; nothing is downloaded.

    Images come out as uint8 [N, 3, S, S], S = config.image_size: grey is repeated to three channels; the shorter
    side is resized to S (bicubic, antialiased) and the centre cut out, unless they are S x S already. Labels are
    0 .. C - 1, and every class has training images.

    Raises:
        UsageError: unknown name; root or files missing, damaged or of another form; more images than memory.
    """
    if config.name not in names():
        raise UsageError(f"unknown data set {config.name!r}: choose from {', '.join(names())}")
    if config.image_size < 1:
        raise UsageError(f"data.image_size: expected at least 1, got {config.image_size}")
    if config.name == "digits":
        return digits(config.image_size)
    readers = {"npz": _npz, "folder": _folder}
    data = readers.get(config.name, _torchvision)(config)
    _expect_classes(data, config)
    return data


def digits(image_size: int = 32) -> LabelledImages:
    """scikit-learn's handwritten digits: 1797 real 8x8 scans of 17 grey levels, ten classes.

    The split is fixed (stratified; 1437 to train on, 360 held out). Scans are upsampled by bicubic
    interpolation to `image_size` and repeated to three channels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images = resize(torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16, image_size)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(labels).long()
    train, test = (torch.tensor(part) for part in indices)
    return LabelledImages(images[train].contiguous(), labels[train], images[test].contiguous(), labels[test])


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of float images [N, C, H, W] in [0, 1]; the result may overshoot that range."""
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def _npz(config: DataConfig) -> LabelledImages:
    path = _root(config, "the .npz file")
    if not path.is_file():
        raise UsageError(f"{path} is not a file: --data.root of `npz` names the .npz file itself")
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {name: _npy_header(archive, name, path) for name in _NPZ_FORMS}
            _expect_npz(headers, path)
            source = sum(int(np.prod(shape)) for shape, _ in headers.values())
            count = headers["train_images"][0][0] + headers["test_images"][0][0]
            _expect_memory(count, config, beside=source)
            arrays = {name: _npy(archive, name) for name in _NPZ_FORMS}
    except (zipfile.BadZipFile, zipfile.zlib.error, ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path} is truncated or no .npz file ({error}): write it again with numpy.savez") from error
    return LabelledImages(
        *(
            tensor
            for split in ("train", "test")
            for tensor in _decode(
                list(zip(arrays[f"{split}_images"], arrays[f"{split}_labels"].tolist(), strict=True)),
                config,
                f"{path}, {split}_images",
            )
        )
    )


_NPZ_FORMS = {
    "train_images": "uint8 [N, H, W, 1 or 3]",
    "train_labels": "integers [N]",
    "test_images": "uint8 [N, H, W, 1 or 3]",
    "test_labels": "integers [N]",
}
