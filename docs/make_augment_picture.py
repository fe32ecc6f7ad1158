"""Draw augment.png: our views beside those of torchvision's Pillow pipeline, for the same parameters.

    python -m docs.make_augment_picture      # from the repository's root; writes augment.png beside this file

The photographs are scikit-learn's two samples, CC BY 2.0, credited in the picture.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import functional as F

from copgen_fast.augmentations import get
from copgen_fast.ops import AugmentParams, augment
from tests.conformance.make_augment import pil_augment

PATH = Path(__file__).with_name("augment.png")
SIDE, DRAWS, AMPLIFIED, SEED = 128, 3, 8, 298
# (photograph, top, left, side) of each row's source.
SOURCES = ((0, 70, 160, 340), (0, 120, 270, 190), (1, 40, 150, 350), (1, 215, 315, 128))
CREDIT = "Photographs: danielbuechele and vultilion (flickr.com), CC BY 2.0, by way of scikit-learn"
# Pixels: an image, the gaps within and between the groups of columns, and the margins.
TILE, GAP, SPACE, LEFT, TOP, BOTTOM = 92, 3, 14, 8, 50, 26


def sources() -> Tensor:
    """uint8 [rows, 3, SIDE, SIDE]."""
    photographs = [Image.fromarray(x) for x in load_sample_images().images]
    boxes = ((photographs[i], (left, top, left + side, top + side)) for i, top, left, side in SOURCES)
    return torch.stack([F.pil_to_tensor(x.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)) for x, box in boxes])


def views(images: Tensor) -> tuple[Tensor, Tensor]:
    """(ours, torchvision's by Pillow), in [0, 1], [DRAWS, rows, 3, SIDE, SIDE]."""
    n, generator = len(images), torch.Generator().manual_seed(SEED)
    params = AugmentParams.sample(DRAWS * n, (SIDE, SIDE), get("simclr"), generator=generator)
    ours = augment(images, params, SIDE)
    drawn = vars(params) | {"sigma": torch.zeros(DRAWS * n)}
    pillow = pil_augment(images.repeat(DRAWS, 1, 1, 1), drawn, (SIDE, SIDE)).float() / 255
    return ours.unflatten(0, (DRAWS, n)), pillow.unflatten(0, (DRAWS, n))


def draw(images: Tensor, ours: Tensor, pillow: Tensor) -> plt.Figure:
    """A row per source; the source, then for each draw ours, Pillow's and their difference."""
    rows = len(images)
    difference = (ours - pillow).abs()
    group = 3 * TILE + 2 * GAP
    width = 2 * LEFT + TILE + DRAWS * (SPACE + group)
    height = TOP + rows * (TILE + GAP) - GAP + BOTTOM
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")

    def place(image: Tensor, row: int, left: int) -> None:
        bottom = height - TOP - row * (TILE + GAP) - TILE
        axes = figure.add_axes((left / width, bottom / height, TILE / width, TILE / height))
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="lanczos")
        axes.axis("off")

    def write(text: str, x: float, y: float, **style: object) -> None:
        figure.text(x / width, 1 - y / height, text, **({"ha": "center", "va": "center", "fontsize": 7.5} | style))

    write("source", LEFT + TILE / 2, TOP - 11)
    for row in range(rows):
        place(images[row].float() / 255, row, LEFT)
    for k in range(DRAWS):
        left = LEFT + TILE + SPACE + k * (SPACE + group)
        write(f"draw {k + 1}", left + group / 2, 13, fontsize=10, fontweight="bold")
        columns = {
            "ours": ours[k],
            "torchvision, PIL": pillow[k],
            f"|difference| × {AMPLIFIED}": AMPLIFIED * difference[k],
        }
        for column, (name, pictures) in enumerate(columns.items()):
            x = left + column * (TILE + GAP)
            write(name, x + TILE / 2, TOP - 11)
            for row in range(rows):
                place(pictures[row], row, x)
    levels = 255 * difference
    found = (
        f"Difference: {levels.mean():.1f} of 255 levels on average, at most {levels.max():.0f}: PIL rounds each step"
    )
    write(found, LEFT, height - BOTTOM / 2, ha="left")
    write(CREDIT, width - LEFT, height - BOTTOM / 2, ha="right", fontsize=6.5, color="#57606a")
    return figure


def main() -> None:
    """Draw it."""
    images = sources()
    draw(images, *views(images)).savefig(PATH, pil_kwargs={"optimize": True})
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
