"""z' = z + noise: by default truncated normal noise times 0.2, as for BigBiGAN (GenRep, Jahanian et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from copgen_fast.options import CountOrZero, Range
from copgen_fast.positives import PositiveFunction, Setting, _groups
from copgen_fast.positives._distance import DRAWS, PART, Scaled, scale_to
from copgen_fast.runtime import latents


@dataclass(frozen=True)
class Config(Scaled):
    """Options of Gaussian positives; with a distance, std does not matter."""

    std: Annotated[float, Range(0, 1e3)] = 0.2
    """Scale of the noise."""
    prior: Literal["truncnorm", "normal"] = "truncnorm"
    """Its distribution before scaling; truncnorm is truncated to [-2, 2]."""
    groups: tuple[CountOrZero, ...] = ()
    """Move only these of the generator's latent groups, counted from 0; (): all."""
    scales: tuple[Annotated[float, Range(-1e3, 1e3)], ...] = ()
    """One factor of the noise for each of `groups`, or for each of all groups if none are chosen."""


def build(setting: Setting) -> PositiveFunction:
    options = setting.options
    factors = _groups.factors(setting.latent_dim, setting.latent_groups, options.groups, options.scales)

    def displacements() -> Iterator[Tensor]:
        for part in range(DRAWS // PART):
            noise = latents.sample(options.prior, (0, 3, part), (PART, setting.latent_dim), options.std)
            yield noise if factors is None else noise * factors

    std = options.std * scale_to(options.distance, "gaussian", displacements())

    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        # The second word makes another stream than the one seeded by `seed` alone, which drew z.
        streams = [(seed, 1) for seed in seeds]
        noise = latents.sample_each(options.prior, streams, setting.latent_dim, std)
        return z + (noise if factors is None else noise * factors)

    return positive


def record(setting: Setting) -> dict[str, Any]:
    options = setting.options
    kept = {name: value for name in ("distance", "groups", "scales") if (value := getattr(options, name))}
    return {"std": options.std, "noise": options.prior} | kept
