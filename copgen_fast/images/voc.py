"""Photographs with annotated boxes, in PASCAL VOC's folders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from copgen_fast.errors import UsageError
from copgen_fast.images import decode

_SHOWN = 3
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image file and its boxes.

    Attributes:
        path: of the image.
        height, width: in pixels, as its annotation says.
        boxes: float32 [K, 4], left, top, right, bottom, where the image's left edge is 0: VOC counts pixels from 1 and
            includes the last, so its xmin and ymin are one more, and xmax and ymax the same.
        labels: int64 [K], the place of each box's class among the classes.
        difficult: bool [K].
    """

    path: Path
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    difficult: Tensor

    def pixels(self) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3].

        Raises:
            UsageError: it can't be decoded, or has other sides than its annotation says.
        """
        try:
            with decode.rgb(self.path) as pixels:
                found = pixels.shape[:2]
        except _UNREADABLE as error:
            raise UsageError(
                f"{self.path} cannot be read as an image ({decode.reason(error)}): replace it, or take its name out of "
                "the lists in ImageSets/Main"
            ) from error
        if found != (self.height, self.width):
            raise UsageError(
                f"{self.path} is {found[1]} x {found[0]} pixels (turned upright), and its annotation says "
                f"{self.width} x {self.height}: its boxes are another image's"
            )
        return pixels


@dataclass(frozen=True, eq=False)
class AnnotatedSet:
    """The images of one or several lists of VOC's folders, in their order.

    Attributes:
        classes: their names, sorted.
        left_out: boxes without area, or outside of their image, by the annotation's file; they are in no image.
    """

    images: tuple[AnnotatedImage, ...]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def warn(self) -> None:
        """Warn about the boxes that were left out."""
        if self.left_out:
            files = list(dict.fromkeys(self.left_out))
            more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
            warnings.warn(
                f"left out {len(self.left_out)} boxes without area, or outside of their image, of "
                f"{', '.join(files[:_SHOWN])}{more}",
                stacklevel=2,
            )


def devkit(root: str | Path) -> Path:
    """The folder VOCdevkit: `root`, or in it.

    Raises:
        UsageError: it is neither.
    """
    root = Path(root).expanduser()
    for folder in (root / "VOCdevkit", root):
        if any(folder.glob("VOC[0-9]*")):
            return folder
    raise UsageError(
        f"{root} has no VOCdevkit/VOC2007 in it: unpack there VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and "
        "VOCtrainval_11-May-2012.tar of PASCAL VOC; nothing is downloaded"
    )


def listed(root: str | Path, lists: Sequence[str]) -> list[tuple[Path, str]]:
    """Year's folder and name of every image of lists such as "2007-trainval", without reading more than the lists.

    Raises:
        UsageError: a folder or a list is missing, or names no image.
    """
    found = []
    for name in lists:
        year, dash, part = name.partition("-")
        if not (dash and year.isdigit() and part):
            raise UsageError(f"a list of VOC images is written as YEAR-LIST, such as 2007-trainval, not {name!r}")
        folder = devkit(root) / f"VOC{year}"
        path = folder / "ImageSets" / "Main" / f"{part}.txt"
        if not path.is_file():
            raise UsageError(f"{path} is missing: put PASCAL VOC's {year} there, or choose other lists than {name}")
        names = [line.split()[0] for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        if not names:
            raise UsageError(f"{path} names no image")
        found += [(folder, name) for name in dict.fromkeys(names)]
    return found


def read(root: str | Path, lists: Sequence[str], classes: Sequence[str] | None = None) -> AnnotatedSet:
    """Read the annotations of all images of some lists; no image is decoded.

    Args:
        root: the folder VOCdevkit, or the one that it lies in.
        lists: such as "2007-trainval", of VOC2007/ImageSets/Main/trainval.txt.
        classes: names that boxes may have; None: whatever they have.

    Raises:
        UsageError: a file is missing or damaged, or a box's class is none of `classes`; the message names it.
    """
    pairs = listed(root, lists)
    expect_images(pairs)
    parsed = [_parse(_annotation_of(*pair)) for pair in pairs]
    names = sorted({box.name for _, boxes in parsed for box in boxes})
    if not names:
        raise UsageError(f"{devkit(root)}: no box is annotated in {', '.join(lists)}")
    if classes is not None and (unknown := [name for name in names if name not in classes]):
        first = next(n for n, (_, boxes) in enumerate(parsed) if any(box.name == unknown[0] for box in boxes))
        where = _annotation_of(*pairs[first])
        raise UsageError(f"{where}: class {unknown[0]!r} has no training image (those are {', '.join(classes)})")
    known = {name: number for number, name in enumerate(classes or names)}
    images, left_out = [], []
    for (folder, name), (size, boxes) in zip(pairs, parsed, strict=True):
        path = _image_of(folder, name)
        height, width = size or _size_of(path)
        good = [box for box in boxes if box.inside(height, width)]
        left_out += [str(_annotation_of(folder, name))] * (len(boxes) - len(good))
        images.append(
            AnnotatedImage(
                path,
                height,
                width,
                torch.tensor([box.sides for box in good]).view(-1, 4),
                torch.tensor([known[box.name] for box in good], dtype=torch.int64),
                torch.tensor([box.difficult for box in good], dtype=torch.bool),
            )
        )
    return AnnotatedSet(tuple(images), tuple(known), tuple(left_out))


def expect_images(pairs: Sequence[tuple[Path, str]]) -> None:
    """Check that every image of `listed` is there, and has its annotation.

    Raises:
        UsageError: one is missing; the message names the first and counts.
    """
    for what, kind in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        folders = {folder for folder, _ in pairs}
        there = {folder: {path.name for path in (folder / what).glob("*")} for folder in folders}
        missing = [folder / what / f"{name}.{kind}" for folder, name in pairs if f"{name}.{kind}" not in there[folder]]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(
                f"{missing[0]}{more} missing: a list in ImageSets/Main names it, so put it there or take its name out"
            )


@dataclass(frozen=True)
class _Box:
    name: str
    sides: tuple[float, float, float, float]
    difficult: bool

    def inside(self, height: int, width: int) -> bool:
        left, top, right, bottom = self.sides
        return max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)


def _parse(path: Path) -> tuple[tuple[int, int] | None, list[_Box]]:
    """Height and width of an annotation's image, None where it does not say, and the boxes."""
    try:
        top = ElementTree.parse(path).getroot()
        height, width = (int(top.findtext(f"size/{side}", "0")) for side in ("height", "width"))
        boxes = [_box(found) for found in top.iterfind("object")]
    except (ElementTree.ParseError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no annotation of PASCAL VOC ({error}): replace it") from error
    return ((height, width) if height > 0 and width > 0 else None), boxes


def _box(found: ElementTree.Element) -> _Box:
    name = (found.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    left, top, right, bottom = (float(found.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    if not np.isfinite([left, top, right, bottom]).all():
        raise ValueError("a box's side is not finite")
    return _Box(name, (left - 1, top - 1, right, bottom), int(found.findtext("difficult", "0") or 0) != 0)


def _annotation_of(folder: Path, name: str) -> Path:
    return folder / "Annotations" / f"{name}.xml"


def _image_of(folder: Path, name: str) -> Path:
    return folder / "JPEGImages" / f"{name}.jpg"


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image whose annotation does not say."""
    try:
        with decode.rgb(path) as pixels:
            return pixels.shape[:2]
    except _UNREADABLE as error:
        raise UsageError(f"{path} cannot be read as an image ({decode.reason(error)}): replace it") from error
