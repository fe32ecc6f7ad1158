"""The seven transfer sets in the layouts that torchvision reads, with a few small images of three classes in each."""

import json
import pickle

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSES = ("ant", "bee", "cat")
NAMES = ("food101", "cifar10", "cifar100", "sun397", "oxfordiiitpet", "caltech101", "flowers102")
COUNTS = {
    "food101": (12, 6),
    "cifar10": (15, 6),
    "cifar100": (12, 6),
    "sun397": (24, 9),
    "oxfordiiitpet": (12, 6),
    "caltech101": (90, 6),
    "flowers102": (12, 6),
}
"""Training and test images, validation parts among the former."""


def pixels(label, number, width=12, height=10):
    """A noisy image of the class's own colour."""
    noise = np.random.default_rng([label, number]).integers(-30, 31, (height, width, 3))
    return (np.where(np.arange(3) == label, 170, 60) + noise).astype(np.uint8)


def jpeg(path, label, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, number)).save(path, "jpeg")


def write(root, name):
    """Write the set `name` under `root`."""
    globals()[f"_{name}"](root)


def trust(monkeypatch):
    """Let torchvision take files whose MD5 is not that of the published ones."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def _food101(root):
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in CLASSES}
        (root / "food-101" / "meta").mkdir(parents=True, exist_ok=True)
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for label, name in enumerate(CLASSES):
            for number in numbers:
                jpeg(root / "food-101" / "images" / name / f"{number}.jpg", label, number)


def _cifar10(root):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    _cifar(root / "cifar-10-batches-py", "labels", dict.fromkeys(batches, 1) | {"test_batch": 2})
    _pickle(root / "cifar-10-batches-py" / "batches.meta", {"label_names": list(CLASSES)})


def _cifar100(root):
    _cifar(root / "cifar-100-python", "fine_labels", {"train": 4, "test": 2})
    _pickle(root / "cifar-100-python" / "meta", {"fine_label_names": list(CLASSES)})


def _cifar(folder, key, batches):
    for batch, (name, per_class) in enumerate(batches.items()):
        labels = [label for label in range(len(CLASSES)) for _ in range(per_class)]
        images = [pixels(label, 10 * batch + row, 32, 32).transpose(2, 0, 1) for row, label in enumerate(labels)]
        _pickle(folder / name, {"data": np.stack(images).reshape(len(labels), -1), key: labels})


def _pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def _sun397(root):
    listed = [f"/{name[0]}/{name}" for name in CLASSES[:2]] + ["/c/cat/indoor"]
    for label, name in enumerate(listed):
        for number in range(11):
            jpeg(root / "SUN397" / name[1:] / f"sun_{number}.jpg", label, number)
    (root / "SUN397" / "ClassName.txt").write_text("".join(f"{name}\n" for name in listed))


def _oxfordiiitpet(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(4)), ("test", range(4, 6))):
        lines = []
        for label, name in enumerate(CLASSES):
            for number in numbers:
                jpeg(folder / "images" / f"{name}_{number}.jpg", label, number)
                lines.append(f"{name}_{number} {label + 1} 1 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))


def _caltech101(root):
    for label, name in enumerate((*CLASSES, "BACKGROUND_Google")):
        for number in range(1, 33):
            jpeg(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", label % 3, number)


def _flowers102(root):
    folder = root / "flowers-102"
    labels = [number % 3 for number in range(18)]
    for number, label in enumerate(labels):
        jpeg(folder / "jpg" / f"image_{number + 1:05d}.jpg", label, number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[label + 1 for label in labels]])})
    ids = np.arange(1, 19)[None]
    savemat(folder / "setid.mat", {"trnid": ids[:, :6], "valid": ids[:, 6:12], "tstid": ids[:, 12:]})
