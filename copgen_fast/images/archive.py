"""Labelled images in one .npz file: TRAIN_images and TRAIN_labels, TEST_images and TEST_labels."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.images.split import ArraySplit, expect_memory
from copgen_fast.images.views import resize_and_crop


def open_splits(path: Path, names: Sequence[str], labelled: bool, size: int) -> dict[str, ArraySplit]:
    """The splits `names` of a file: labels are read, and images only when they are needed.

    Args:
        labelled: whether labels are read, too.
        size: that images will be resized to.

    Raises:
        UsageError: an array is missing or of another form, the file is damaged, or memory is short.
    """
    splits = {}
    with _opened(path) as archive:
        shapes = {name: _shape(archive, path, f"{name}_images") for name in names}
        for name in names if labelled else ():
            _shape(archive, path, f"{name}_labels", shapes[name][0])
        count = sum(shape[0] for shape in shapes.values())
        expect_memory(count, size, file_bytes=sum(map(math.prod, shapes.values())))
        for name, shape in shapes.items():
            labels = torch.from_numpy(_array(archive, f"{name}_labels").astype(np.int64)) if labelled else None
            load = partial(_images, path, f"{name}_images")
            splits[name] = ArraySplit(shape[0], labels, load, file_bytes=math.prod(shape))
    return splits


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (CopgenError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise anything over damaged files
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is truncated or not an .npz file ({why}): write it again with numpy.savez") from error


def _images(path: Path, key: str, size: int | None) -> Tensor:
    with _opened(path) as archive:
        images = torch.from_numpy(_array(archive, key)).movedim(3, 1)
    return images.expand(-1, 3, -1, -1) if size is None else resize_and_crop(images, size)


def _array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    with archive.open(f"{key}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _shape(archive: zipfile.ZipFile, path: Path, key: str, count: int | None = None) -> tuple[int, ...]:
    """Shape of an array by its header, checked before the array is read.

    Args:
        count: of the images, for labels.
    """
    if f"{key}.npy" not in archive.namelist():
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UsageError(f"{path} has no array {key!r} (it holds: {found}): add it")
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{1 if version == (1, 0) else 2}_0")
        shape, _, dtype = read_header(file)
    if count is None:
        valid, form = dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3), "uint8 [N, H, W, 1 or 3]"
    else:
        valid, form = dtype.kind in "iu" and shape == (count,), f"integers [{count}], one for each image"
    if not valid or min(shape) < 1:
        raise UsageError(f"{path}: {key} is {dtype} {list(shape)}, expected {form}")
    return shape
