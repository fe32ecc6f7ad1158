"""Draw positives.png: anchors over their positives, before and after the navigator's training, from a run's grids.

python -m docs.make_positives_picture runs/quickstart      # from the repository's root
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from copgen_fast.runtime import artifacts

PATH = Path(__file__).with_name("positives.png")
PADDING = 2  # between the images of a grid
TILE, GAP, LEFT = 50, 4, 190  # pixels of the picture


def tiles(grid: Path) -> list[list[Image.Image]]:
    """Rows of square images of a grid: anchors, then positives."""
    image = Image.open(grid)
    side = (image.height - PADDING) // 2
    boxes = [[(x, y) for x in range(PADDING, image.width, side)] for y in (PADDING, PADDING + side)]
    return [[image.crop((x, y, x + side - PADDING, y + side - PADDING)) for x, y in row] for row in boxes]


def draw(rows: dict[str, list[Image.Image]]) -> plt.Figure:
    """A row of images for each label."""
    columns = max(map(len, rows.values()))
    width, height = LEFT + columns * (TILE + GAP), len(rows) * (TILE + GAP) + GAP
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    for row, (label, images) in enumerate(rows.items()):
        bottom = height - (row + 1) * (TILE + GAP)
        figure.text(8 / width, (bottom + TILE / 2) / height, label, va="center", fontsize=9)
        for column, image in enumerate(images):
            left = LEFT + column * (TILE + GAP)
            axes = figure.add_axes((left / width, bottom / height, TILE / width, TILE / height))
            axes.imshow(image, interpolation="lanczos")
            axes.axis("off")
    return figure


def main(run: str) -> None:
    """Draw it."""
    folder = Path(run) / "navigator"
    grids = sorted((folder / "grids").glob("*.png"))
    distance = artifacts.read_json(folder / "summary.json")["displacement_norm"]
    anchors, untrained = tiles(grids[0])
    rows = {
        "anchor  $G(z)$": anchors,
        "positive  $G(z + T_z(z))$\nbefore training": untrained,
        f"positive  $G(z + T_z(z))$\ntrained to $E||T_z(z)|| = {distance:.2f}$": tiles(grids[-1])[1],
    }
    draw(rows).savefig(PATH, pil_kwargs={"optimize": True})
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
