"""Seeded latents z, drawn as by BigGAN's and the reference code's `truncated_noise_sample`: truncated to [-2, 2]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Prior = Literal["truncnorm", "normal"]
Seed = int | Sequence[int]


def sample(prior: Prior, seed: Seed, size: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Draw float32 latents of shape `size` from one seed.

    `truncnorm` inverts the distribution function of N(0, 1) truncated to [-2, 2] at
    u = RandomState(seed).uniform(size): after the cast to float32 it is bit-identical to
    scipy.stats.truncnorm.rvs(-2, 2, scale=scale, random_state=seed). `normal` is scale * N(0, 1).

    Args:
        seed: an int in [0, 2**32), or a sequence of them for an independent stream.
    """
    from scipy.special import ndtr, ndtri

    random = np.random.RandomState(seed)
    if prior == "truncnorm":
        low, high = ndtr(-2.0), ndtr(2.0)
        values = ndtri(low + random.uniform(size=size) * (high - low))
    elif prior == "normal":
        values = random.standard_normal(size)
    else:
        raise ValueError(f"prior: expected 'truncnorm' or 'normal', got {prior!r}")
    return torch.from_numpy((values * scale).astype(np.float32))


def sample_each(prior: Prior, seeds: Iterable[Seed], latent_dim: int, scale: float = 1.0) -> Tensor:
    """One latent per seed, float32 [N, latent_dim]: row i depends on seed i alone, not on the batch."""
    rows = [sample(prior, seed, (latent_dim,), scale) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, latent_dim)
