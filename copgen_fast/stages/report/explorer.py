"""Sheets of sixteen anchors and their positives at growing scales, which the page's sliders choose from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from copgen_fast import positives
from copgen_fast.images import pictures
from copgen_fast.registry import label
from copgen_fast.stages.report.scene import COLUMNS, Scene
from copgen_fast.stages.run import Run

FARTHEST = 2
"""Largest multiple of a displacement."""
STEPS = (8, 4, 2)
"""Numbers of scales above 0, the finest first."""
TIMES, FEW = 8, 4
"""Earlier navigators, at most; scales are left out before fewer than `FEW` of these are shown."""
_MARGIN = 1.2  # by which positives may take more bytes than anchors


@dataclass(frozen=True)
class Sheet:
    """A picture of G(z + s dz): a column for every anchor z, a row for every scale s from 0 to `FARTHEST`.

    Attributes:
        way: of making positives.
        time: when in training the navigator made them; "" for other ways.
        distance: mean norm of dz over the anchors.
    """

    way: str
    time: str
    distance: float
    picture: bytes

    @property
    def name(self) -> str:
        """Way and time."""
        return " ".join(filter(None, (self.way, self.time)))


@dataclass(frozen=True)
class Explorer:
    """The sheets of a page, and what they have in common.

    Attributes:
        steps: scales above 0.
        size: height and width of an image on a sheet.
        smaller: whether the generator's are larger.
        conditional: whether images have classes, an anchor and its positives the same.
        kept: navigators that the run kept.
    """

    sheets: tuple[Sheet, ...]
    steps: int
    size: tuple[int, int]
    smaller: bool
    conditional: bool
    kept: int
    columns: int = COLUMNS
    farthest: int = FARTHEST

    @property
    def ways(self) -> list[str]:
        """Ways of making positives, in the order of the sheets."""
        return list(dict.fromkeys(sheet.way for sheet in self.sheets))

    @property
    def first(self) -> str:
        """The way shown first."""
        return "navigator" if "navigator" in self.ways else self.ways[0]

    @property
    def times(self) -> list[str]:
        """When in training the navigators shown were kept."""
        return [sheet.time for sheet in self.sheets if sheet.time]


def explore(run: Run, scene: Scene, budget: int) -> Explorer | None:
    """Sheets of every way of making positives that moves latents, of the navigator at several times of its training.

    Args:
        budget: bytes of all pictures, which decide the numbers of scales and times.

    Returns:
        None where no way moves latents.
    """
    ways = {name: displacement(run, scene, name) for name in positives.options(run.config.pairs)}
    ways = {name: dz for name, dz in ways.items() if dz.any()}
    if not ways:
        return None
    kept = sorted((run.folder / "navigator" / "kept").glob("*.safetensors")) if "navigator" in ways else []
    anchors = scene.images(scene.z, scene.classes(COLUMNS))
    row = int(_MARGIN * len(pictures.smallest(pictures.grid(anchors, COLUMNS, padding=0), scene.quality)))
    steps, times = plan(row, len(ways), max(0, len(kept) - 1), budget)
    moves: list[tuple[str, str, Tensor]] = []
    for name, dz in ways.items():
        learned = kept if name == "navigator" else []
        for path in (learned[index * (len(learned) - 1) // times] for index in range(times if learned else 0)):
            moves.append((label(name), _time(path), displacement(run, scene, name, path)))
        moves.append((label(name), _time(learned[-1]) if learned else "", dz))
    sheets = [draw(scene, *move, steps, budget // len(moves)) for move in moves]
    size, G = tuple(anchors.shape[2:]), scene.G
    return Explorer(tuple(sheets), steps, size, scene.smaller, bool(G.classes), len(kept))


def displacement(run: Run, scene: Scene, way: str, navigator: Path | None = None) -> Tensor:
    """dz [16, L] of the anchors by a way of making positives, with another file of T_z where one is given."""
    setting = run.setting(scene.G, positives.options(run.config.pairs)[way])
    if navigator is not None:
        setting = dataclasses.replace(setting, navigator_file=navigator)
    return positives.build(way, setting)(scene.z, scene.seeds) - scene.z


def plan(row: int, ways: int, earlier: int, budget: int) -> tuple[int, int]:
    """How many scales above 0 and how many earlier navigators fit into `budget` bytes, a row of images taking `row`.

    Args:
        ways: sheets that are there in any case.
        earlier: navigators that were kept before the last one.
    """
    for steps in STEPS:
        room = budget // (row * (steps + 1)) - ways
        if room >= min(earlier, FEW):
            break
    return steps, max(0, min(earlier, room, TIMES))


def draw(scene: Scene, way: str, time: str, dz: Tensor, steps: int, limit: int) -> Sheet:
    """The sheet of a displacement [16, L], in about `limit` bytes at most."""
    z = torch.cat([scene.z + scale * dz for scale in torch.linspace(0, FARTHEST, steps + 1)])
    labels = scene.classes(COLUMNS)
    images = scene.images(z, None if labels is None else labels.repeat(steps + 1))
    picture = pictures.smallest(pictures.grid(images, COLUMNS, padding=0), scene.quality, limit)
    return Sheet(way, time, dz.norm(dim=1).mean().item(), picture)


def _time(path: Path) -> str:
    samples = int(path.stem)
    return f"after {samples:,} latents" if samples else "before training"
