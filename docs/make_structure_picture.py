"""Draw structure.png: which parts of copgen_fast/ import which, read from their files.

python -m docs.make_structure_picture      # from the repository's root
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from tests.test_layers import PACKAGE, ROW_OF, ROWS, files, imported, room_of

PATH = Path(__file__).with_name("structure.png")
COLOURS = ("#57606a", "#9a6700", "#bf3989", "#1f6feb", "#1a7f37", "#8250df", "#d1242f", "#0b7285")
WIDTH, BOX_HEIGHT, STEP = 13.0, 0.42, 1.25


def read() -> dict[str, set[str]]:
    """Rooms (files and folders of the package) that each room imports."""
    graph: dict[str, set[str]] = {room: set() for room in ROW_OF}
    for path in files("copgen_fast"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names = (name.split(".")[1:] for name in imported(path) if name.startswith("copgen_fast."))
        graph.get(room_of(parts), set()).update(room_of(name) for name in names if room_of(name) in ROW_OF)
    return {
        room: others - {room}
        for room, others in graph.items()
        if (PACKAGE / room.replace(".", "/")).exists() or (PACKAGE / f"{room}.py").exists()
    }


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others: the transitive reduction."""

    def reached(room: str) -> set[str]:
        return graph[room].union(*(reached(other) for other in graph[room]))

    return {room: others - set().union(*(reached(other) for other in others)) for room, others in graph.items()}


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Centre of each room's box: the lowest row, which imports nothing, at the top."""
    found = {}
    for row, rooms in enumerate(ROWS):
        rooms = sorted(rooms & graph.keys())
        aside = (1.6 if row % 2 else -1.6) if len(rooms) == 1 else 0  # no two on one line of arrows
        for column, room in enumerate(rooms):
            found[room] = (WIDTH * (column + 0.5) / len(rooms) + aside, -STEP * row)
    return found


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    start, end = (start[0], start[1] + BOX_HEIGHT / 2), (end[0], end[1] - BOX_HEIGHT / 2)
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 1} | style)


def draw(graph: dict[str, set[str]]) -> plt.Figure:
    """Boxes in rows; an arrow points at what is imported, faint where another path of arrows says so too."""
    figure, axes = plt.subplots(figsize=(WIDTH, STEP * len(ROWS)), layout="constrained")
    at, needed = places(graph), direct(graph)
    for room, others in graph.items():
        for other in others - needed[room]:
            arrow(axes, at[room], at[other], color="#d0d7de", linewidth=0.5, alpha=0.6)
    for room, others in needed.items():
        for other in others:
            arrow(axes, at[room], at[other], color=COLOURS[ROW_OF[room] % len(COLOURS)], linewidth=1.3)
    for room, (x, y) in at.items():
        colour = COLOURS[ROW_OF[room] % len(COLOURS)]
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5}
        folder = (PACKAGE / room.replace(".", "/")).is_dir()
        axes.text(
            x, y, f"{room.replace('.', '/')}/" if folder else room, ha="center", va="center", fontsize=11, bbox=box
        )
    axes.set(xlim=(0, WIDTH), ylim=(-STEP * (len(ROWS) - 1) - 0.6, 0.6))
    axes.axis("off")
    return figure


def main() -> None:
    """Draw it."""
    drawn = io.BytesIO()
    draw(read()).savefig(drawn, dpi=80)
    Image.open(drawn).convert("RGB").quantize(64).save(PATH, optimize=True)
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
