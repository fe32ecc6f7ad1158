"""Labelled image data sets in memory, for evaluations and for pretraining on real images."""

from __future__ import annotations

import math
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime.memory import available_memory

_UINT8 = (torch.uint8,)


@dataclass(frozen=True)
class LabelledImages:
    """The training and test split of a data set.

    Attributes:
        train_images, test_images: uint8 [N, 3, H, W].
        train_labels, test_labels: int64 [N], in 0 .. num_classes - 1.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape; the message names it.
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


class RealPairs(Dataset):
    """Real images as pairs: each is its own positive, as in SimCLR.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N], for a supervised loss.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images = expect_tensor("images", images, ("N", 3, "H", "W"), _UINT8)
        self.labels = labels if labels is None else expect_tensor("labels", labels, (len(images),), (torch.int64,))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The same image twice, uint8 [3, H, W], and its label, or -1."""
        image = self.images[index]
        return image, image, -1 if self.labels is None else int(self.labels[index])


@dataclass(frozen=True)
class _TorchvisionSet:
    """A torchvision data set: its class, the arguments of each split (several are concatenated), the files it reads."""

    cls: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    files: str


_BOOLEAN = ({"train": True},), ({"train": False},)
_SPLIT = ({"split": "train"},), ({"split": "test"},)
_TRAINVAL = ({"split": "trainval"},), ({"split": "test"},)
_TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"}), ({"split": "test"},)

# Validation splits are trained on as well, as is usual in transfer experiments.
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
    """Names of the data sets that `load` reads."""
    return ["digits", "npz", "folder", *sorted(_TORCHVISION)]


def load(config: DataConfig) -> LabelledImages:
    """Read the data set `config.name` from `config.root` into memory; nothing is downloaded.

    Images are returned as uint8 [N, 3, S, S], S = config.image_size: grey is repeated to three channels; the shorter
    side is resized to S (bicubic, antialiased) and the centre cropped. Labels are 0 .. C - 1, and every class has
    training images.

    Raises:
        UsageError: the name is unknown, files are missing or not as expected, or the images don't fit into memory.
    """
    root = find(config)
    if root is None:
        return digits(config.image_size)
    if config.name == "npz":
        data = _npz(root, config.image_size)
    else:
        splits = _folder(root) if config.name == "folder" else _torchvision(_TORCHVISION[config.name], root)
        _expect_memory(sum(map(len, splits)), config.image_size)
        data = LabelledImages(*(tensor for split in splits for tensor in _decode(split, config)))
    _expect_classes(data, config)
    return data


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
            raise UsageError(f"--data.root {path} is a folder: data set 'npz' needs the .npz file itself")
        return path
    if config.name == "folder":
        return _root(config, "a folder that holds train/CLASS/* and test/CLASS/*")
    return _root(config, f"the folder that holds {_TORCHVISION[config.name].files}")


def digits(image_size: int = 32) -> LabelledImages:
    """scikit-learn's handwritten digits: 1797 real 8x8 scans with 17 grey levels, ten classes.

    The split is fixed: stratified, 1437 for training and 360 held out. Scans are resized (bicubic) to `image_size`
    and repeated to three channels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images = resize(torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16, image_size)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(labels).long()
    train, test = map(torch.tensor, indices)
    return LabelledImages(images[train].contiguous(), labels[train], images[test].contiguous(), labels[test])


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


def _npz(path: Path, size: int) -> LabelledImages:
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = _npz_shapes(archive, path)
            count = shapes["train_images"][0] + shapes["test_images"][0]
            _expect_memory(count, size, file_bytes=sum(map(math.prod, shapes.values())))
            arrays = {}
            for key in shapes:
                with archive.open(f"{key}.npy") as file:
                    arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UsageError(
            f"{path} is truncated or not an .npz file ({error}): write it again with numpy.savez"
        ) from error
    return LabelledImages(
        _resize_and_crop(torch.from_numpy(arrays["train_images"]).movedim(3, 1), size),
        torch.from_numpy(arrays["train_labels"].astype(np.int64)),
        _resize_and_crop(torch.from_numpy(arrays["test_images"]).movedim(3, 1), size),
        torch.from_numpy(arrays["test_labels"].astype(np.int64)),
    )


def _npz_shapes(archive: zipfile.ZipFile, path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the four arrays by name, checked before any is read."""
    shapes = {}
    for key in ("train_images", "train_labels", "test_images", "test_labels"):
        if f"{key}.npy" not in archive.namelist():
            found = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
            raise UsageError(f"{path} has no array {key!r} (it holds: {found}): add it")
        with archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, f"read_array_header_{1 if version == (1, 0) else 2}_0")
            shape, _, dtype = read_header(file)
        if key.endswith("images"):
            valid, form = dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3), "uint8 [N, H, W, 1 or 3]"
        else:
            count = shapes[key.replace("labels", "images")][0]
            valid, form = dtype.kind in "iu" and shape == (count,), f"integers [{count}], one for each image"
        if not valid or 0 in shape:
            raise UsageError(f"{path}: {key} is {dtype} {list(shape)}, expected {form}")
        shapes[key] = shape
    return shapes


def _folder(root: Path) -> tuple[Dataset, Dataset]:
    from torchvision.datasets import ImageFolder

    splits = []
    for split in (root / "train", root / "test"):
        if not split.is_dir():
            raise UsageError(f"{split} is missing: put images there as {split.name}/CLASS/FILE")
        try:
            splits.append(ImageFolder(str(split), loader=_open_image))
        except FileNotFoundError as error:  # no class folders, or one without images
            raise UsageError(f"{split} should hold images as CLASS/FILE: {error}") from error
    train, test = splits
    if train.classes != test.classes:
        different = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise UsageError(f"{root}: train and test must have the same classes; in one of them only: {different}")
    return train, test


def _open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise UsageError(f"{path} cannot be read as an image ({error}): remove or replace it") from error


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


def _torchvision(entry: _TorchvisionSet, root: Path) -> tuple[Dataset, Dataset]:
    from torchvision import datasets

    build = getattr(datasets, entry.cls)
    try:
        train, test = (
            ConcatDataset([build(str(root), download=False, **arguments) for arguments in split])
            for split in (entry.train, entry.test)
        )
    except (RuntimeError, ValueError, EOFError, OSError) as error:  # torchvision's for missing or damaged files
        raise UsageError(
            f"{root} lacks {entry.files}, or files of it are damaged: put there what "
            f"torchvision.datasets.{entry.cls}({str(root)!r}, download=True) would; nothing is downloaded here"
        ) from error
    return train, test


def _decode(items: Dataset, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, S, S] and labels int64 [N], read in threads, as Pillow releases the interpreter's lock."""
    size = config.image_size
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(items), dtype=torch.int64)

    def read(block: range) -> None:
        for index in block:
            try:
                image, label = items[index]
            except _UNREADABLE as error:
                raise UsageError(
                    f"image {index} of {config.name} cannot be read ({error}): replace its file"
                ) from error
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
            images[index] = _resize_and_crop(pixels.movedim(2, 0)[None], size)[0]
            labels[index] = int(label)

    blocks = [range(start, min(start + 256, len(items))) for start in range(0, len(items), 256)]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, blocks):
            pass
    return images, labels


def _resize_and_crop(images: Tensor, size: int) -> Tensor:
    """uint8 [N, 1 or 3, H, W] -> contiguous uint8 [N, 3, size, size]: shorter side resized, centre cropped."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = (round(height * scale), round(width * scale))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for block, out in zip(images.split(1024), resized.split(1024), strict=True):  # bounds temporary memory
        if shape != (height, width):
            block = F.interpolate(block, size=shape, mode="bicubic", align_corners=False, antialias=True)
        out.copy_(block[:, :, top : top + size, left : left + size])
    return resized


def _expect_classes(data: LabelledImages, config: DataConfig) -> None:
    train, test = data.train_labels.unique().tolist(), data.test_labels.unique().tolist()
    if train != list(range(len(train))) or not set(test) <= set(train):
        raise UsageError(
            f"{config.root}: labels must be 0 .. C - 1, each with training images; "
            f"training labels are {_shown(train)}, test labels {_shown(test)}"
        )


def _shown(labels: list[int]) -> str:
    return f"{', '.join(map(str, labels[:12]))}{', ...' if len(labels) > 12 else ''}"


def _expect_memory(count: int, size: int, file_bytes: int = 0) -> None:
    """Refuse before decoding what would not fit into memory, with `file_bytes` that are held at the same time."""
    needed, free = (3 * count * size**2 + file_bytes) / 1e6, available_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UsageError(
            f"{count} images of {size} px take {needed / 1e3:.3g} GB and {free / 1e3:.3g} GB of memory are free: "
            "lower --data.image-size or take fewer images"
        )
