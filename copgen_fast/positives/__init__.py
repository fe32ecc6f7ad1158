"""Ways to make positives, z -> z': one file each, named as on the command line.

Each file has `build(setting) -> positive`, where `positive(z, seeds)` maps latents [N, L] (float32, CPU) and their N
sample seeds to positives [N, L]; a row depends on its own latent and seed only. It may have `Config`, a frozen
dataclass of its options, and `record(setting) -> dict`, plain JSON values that decide its positives besides these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from copgen_fast import registry
from copgen_fast.config import NavigatorConfig, PairsConfig

PositiveFunction = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Setting:
    """What the `build` of a way of making positives receives.

    Attributes:
        latent_dim: length L of a latent.
        seed: the run's.
        navigator: the navigator stage's configuration.
        navigator_file: where the navigator stage leaves the trained T_z.
        options: an instance of the way's `Config`.
    """

    latent_dim: int
    seed: int
    navigator: NavigatorConfig
    navigator_file: Path
    options: Any = registry.NoOptions()


def options(config: PairsConfig) -> dict[str, Any]:
    """The options of every way in `config.positives`, by name.

    Raises:
        UsageError: see `registry.options_by_name`.
    """
    return registry.options_by_name("positives", config.positives, config.options)


def build(name: str, setting: Setting) -> PositiveFunction:
    """The function that makes positives the way called `name`.

    Raises:
        UsageError: no such way, or an artefact it needs is missing.
    """
    return registry.load("positives", name).build(setting)


def record(name: str, setting: Setting) -> dict[str, Any]:
    """What decides the positives of a way, for the record of pairs: its options, a navigator's digest."""
    module = registry.load("positives", name)
    if hasattr(module, "record"):
        return module.record(setting)
    return registry.as_record(setting.options)
