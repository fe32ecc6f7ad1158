"""Ways to make positives, z -> z': one file each, named as on the command line.

Each file has `build(setting) -> positive`, where `positive(z, seeds)` maps latents [N, L] (float32, CPU) and
their N sample seeds to positives [N, L]. A row depends on its own latent and seed only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from copgen_fast import registry
from copgen_fast.config import NavigatorConfig, PairsConfig

PositiveFunction = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Setting:
    """What a way of making positives may need."""

    latent_dim: int
    seed: int
    navigator: NavigatorConfig
    pairs: PairsConfig
    navigator_file: Path
    """Where the navigator stage leaves the trained T."""


def build(name: str, setting: Setting) -> PositiveFunction:
    """Make the way called `name`.

    Raises:
        UsageError: no such way, or an artefact it needs is missing.
    """
    return registry.load("positives", name).build(setting)
