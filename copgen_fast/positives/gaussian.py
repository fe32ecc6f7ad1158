"""z' = z + noise: by default truncated normal noise times 0.2, as for BigBiGAN (GenRep, Jahanian et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.runtime import latents


@dataclass(frozen=True)
class Config:
    """Options of Gaussian positives."""

    std: float = 0.2
    """Scale of the noise."""
    prior: Literal["truncnorm", "normal"] = "truncnorm"
    """Its distribution before scaling; truncnorm is truncated to [-2, 2]."""

    def __post_init__(self) -> None:
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std: expected zero or more, got {self.std}")


def build(setting: Setting) -> PositiveFunction:
    options = setting.options

    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        # The second word makes another stream than the one seeded by `seed` alone, which drew z.
        streams = [(seed, 1) for seed in seeds]
        return z + latents.sample_each(options.prior, streams, setting.latent_dim, options.std)

    return positive


def record(setting: Setting) -> dict[str, Any]:
    return {"std": setting.options.std, "noise": setting.options.prior}
