"""Small sets in PASCAL VOC's folders: noise with bright and dark rectangles, which are their two classes."""

import numpy as np
import torch
from PIL import Image

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import Encoder

CLASSES = {"bright": 230, "dark": 20}


def annotation(name, width, height, objects):
    """VOC's XML; objects are (class, (xmin, ymin, xmax, ymax), difficult)."""
    text = "".join(
        f"<object><name>{label}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for label, box, difficult in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{text}</annotation>"


def write_image(folder, name, pixels, objects, xml=None):
    """An image and its annotation in the folder of a year."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "Annotations" / f"{name}.xml").write_text(xml or annotation(name, width, height, objects))


def write_list(folder, part, names):
    (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))


def rectangles(rng, height, width, count=2):
    """Pixels and objects: one or two rectangles side by side."""
    pixels = rng.integers(90, 160, (height, width, 3), np.uint8)
    objects = []
    for column in range(count):
        label = str(rng.choice(list(CLASSES)))
        left = column * width // count + int(rng.integers(1, 6))
        top = int(rng.integers(1, height // 2 - 2))
        right, bottom = left + int(rng.integers(14, width // count - 7)), top + int(rng.integers(14, height // 2))
        bottom = min(bottom, height - 1)
        pixels[top : bottom + 1, left : right + 1] = CLASSES[label]
        objects.append((label, (left + 1, top + 1, right + 1, bottom + 1), False))  # counted from 1, both included
    return pixels, objects


def write_set(root, train=8, test=4, seed=0, sides=((48, 64), (64, 48))):
    """VOCdevkit/VOC2007 with the lists trainval and test, images of both orientations in turn."""
    folder, rng = root / "VOCdevkit" / "VOC2007", np.random.default_rng(seed)
    names = [f"{number:06d}" for number in range(train + test)]
    for number, name in enumerate(names):
        write_image(folder, name, *rectangles(rng, *sides[number % len(sides)]))
    write_list(folder, "trainval", names[:train])
    write_list(folder, "test", names[train:])
    return folder


def tiny_encoder(width=8, seed=0, stem="imagenet"):
    torch.manual_seed(seed)
    return Encoder(EncoderConfig("resnet18", stem, width))
