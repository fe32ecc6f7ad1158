"""z' = z + noise, GenRep's Gaussian way: by default truncated normal noise times a scale (0.2 for BigBiGAN)."""

from __future__ import annotations

from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.runtime import latents


def build(setting: Setting) -> PositiveFunction:
    pairs = setting.pairs

    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        # The second word makes a stream of its own: the first one, seeded by `seed` alone, drew z.
        streams = [(seed, 1) for seed in seeds]
        return z + latents.sample_each(pairs.gaussian_prior, streams, setting.latent_dim, pairs.gaussian_std)

    return positive
