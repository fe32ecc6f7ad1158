"""Loading images by torchvision's ImageFolder and DataLoader, and resizing them in a Pillow loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def epoch(folder: Path, batch: int, side: int, workers: int, device: torch.device) -> Callable[[], None]:
    """A function that loads all images of class folders once, centre-cropped and shuffled, as uint8 on the device.

    Workers persist from call to call, in this form's favour.
    """
    view = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
        ]
    )
    files = datasets.ImageFolder(str(folder), view)
    loader = DataLoader(files, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for images, _ in loader:
            images.to(device)

    return run


def packing(paths: Sequence[Path], out: Path, side: int, processes: int) -> Callable[[], None]:
    """A call resizes all images' shorter sides by Pillow and saves them as JPEG files, one process for each core.

    The processes persist from call to call, in this form's favour.
    """
    out.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    parts = [paths[start::processes] for start in range(processes)]

    def run() -> None:
        list(pool.map(partial(resize_all, out=out, side=side), parts))

    return run


def resize_all(paths: Sequence[Path], out: Path, side: int) -> None:
    """What one of these processes does."""
    for path in paths:
        image = Image.open(path).convert("RGB")
        size = tuple(side * length // min(image.size) for length in image.size)
        image.resize(size, Image.Resampling.BICUBIC).save(out / path.name, quality=95, subsampling=0)
