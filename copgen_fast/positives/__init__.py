"""Ways to make positives, z -> z': one file each, named as on the command line.

Each file has `build(setting) -> positive`, where `positive(z, seeds)` maps latents [N, L] (float32, CPU) and their N
sample seeds to positives [N, L]; a row depends on its own latent and seed only. It may have `Config`, a frozen
dataclass of its options, and `record(setting) -> dict`, plain JSON values that decide its positives besides these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from copgen_fast import registry
from copgen_fast.config import NavigatorConfig, PairsConfig, RunConfig, SteeringConfig
from copgen_fast.positives import _groups
from copgen_fast.runtime.latents import Sample

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
        latent_groups: the generator's, see `generators.Generator`.
        steering: the steering stage's configuration.
        steering_file: where the steering stage leaves the walks.
        latent_shape: the generator's.
        sample: draws latents of the generator's prior; None: of truncnorm.
    """

    latent_dim: int
    seed: int
    navigator: NavigatorConfig
    navigator_file: Path
    options: Any = registry.NoOptions()
    latent_groups: tuple[int, ...] = ()
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    steering_file: Path = Path()
    latent_shape: tuple[int, ...] = ()
    sample: Sample | None = None


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
    return registry.function("positives", name)(setting)


def record(name: str, setting: Setting) -> dict[str, Any]:
    """What decides the positives of a way, for the record of pairs: its options, a navigator's digest."""
    module = registry.load("positives", name)
    if hasattr(module, "record"):
        return module.record(setting)
    return registry.as_record(setting.options)


def norms(dz: Tensor, latent_groups: tuple[int, ...]) -> dict[str, Tensor]:
    """E||dz|| as `displacement_norm`, and, of several latent groups, `displacement_norm_0` and so on."""
    found = {"displacement_norm": dz.norm(dim=1).mean()}
    if len(latent_groups) > 1:
        parts = dz.split(list(latent_groups), dim=1)
        found |= {f"displacement_norm_{i}": part.norm(dim=1).mean() for i, part in enumerate(parts)}
    return found


def groups_named(config: RunConfig) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Latent groups that a run's settings name, and its numbers for them, by the setting; without those of all."""
    found = {
        "navigator.groups": (config.navigator.groups, ()),
        "navigator.group_deltas": (config.navigator.groups, config.navigator.group_deltas),
        "steering.groups": (config.steering.groups, ()),
    }
    for name, given in options(config.pairs).items():
        of = f"positive.options {registry.label(name)}"
        groups = getattr(given, "groups", ())
        found |= {f"{of}.groups": (groups, ()), f"{of}.scales": (groups, getattr(given, "scales", ()))}
    return {name: named for name, named in found.items() if any(named)}


def expect_groups(config: RunConfig, latent_groups: tuple[int, ...]) -> None:
    """Raises UsageError where a setting names a latent group that the generator lacks, or not a number for each."""
    for name, (groups, values) in groups_named(config).items():
        _groups.expect(name, latent_groups, groups, values)
