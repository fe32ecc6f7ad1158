"""Loading of pairs in the form of the reference code.

Two files for each pair in a folder of each class, found by glob; each a PIL picture, augmented on the CPU by
torchvision; worker processes of a DataLoader. Unlike there, workers persist from epoch to epoch, in the peer's favour,
as epochs are short here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.baselines.augment import compose
from copgen_fast.ops import AugmentPolicy
from copgen_fast.pairs.read.dataset import PairDataset


def write_files(folder: Path, pairs: PairDataset, extension: str, per_class: int = 1300) -> None:
    """Anchors and positives, laid out and named as the reference code does: PIL's default PNG, or our JPEG."""
    for index in range(len(pairs)):
        number = index // per_class
        home = folder / "train" / f"n{number:08d}"
        home.mkdir(parents=True, exist_ok=True)
        for which, name in enumerate(("anchor", "neighbor")):
            path = home / f"seed{number:04d}_sample{index % per_class:05d}_{name}.{extension}"
            if extension == "png":
                Image.fromarray(pairs[index][which].permute(1, 2, 0).contiguous().numpy()).save(path)
            else:
                path.write_bytes(pairs.read(index).images[which])


class PairFiles(Dataset):
    """Views of both images of each pair, and its class."""

    def __init__(self, folder: Path, extension: str, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform
        self.anchors = list((folder / "train").glob(f"*/*_anchor.{extension}"))
        self.classes = {name: i for i, name in enumerate(dict.fromkeys(path.parent.name for path in self.anchors))}

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        anchor = self.anchors[index]
        neighbor = anchor.with_name(anchor.name.replace("anchor", "neighbor"))
        views = [self.transform(Image.open(path)) for path in (anchor, neighbor)]
        return *views, self.classes[anchor.parent.name]


def epoch(
    folder: Path, extension: str, batch: int, policy: AugmentPolicy | None, side: int, workers: int
) -> Callable[[], None]:
    """A call loads all pairs once: both views, float32, normalised; without a policy the images, uint8."""
    transform = transforms.PILToTensor() if policy is None else compose(transforms, policy, side, pictures=True)
    files = PairFiles(folder, extension, transform)
    loader = DataLoader(files, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for anchors, positives, _ in loader:
            torch.cat([anchors, positives])

    return run
