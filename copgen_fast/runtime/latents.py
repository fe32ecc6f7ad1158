"""Sampling of latents z from named priors, with one seed for each latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from copgen_fast.config import Prior

Seed = int | Sequence[int]


def sample(prior: Prior, seed: Seed, size: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Draw float32 latents of shape `size` from one seed.

    `truncnorm` inverts the distribution function of N(0, 1) truncated to [-2, 2] at
    u = RandomState(seed).uniform(size), as BigGAN's and the reference code's `truncated_noise_sample`: after the cast
    to float32 it is bit-identical to scipy.stats.truncnorm.rvs(-2, 2, scale=scale, random_state=seed). `normal` is
    N(0, 1); `uniform` lies in [-1, 1]; `sphere` is normal, each row (the last dimension) scaled to the norm sqrt(L).

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
    elif prior == "uniform":
        values = random.uniform(-1, 1, size)
    elif prior == "sphere":
        values = random.standard_normal(size)
        values *= np.sqrt(size[-1]) / np.linalg.norm(values, axis=-1, keepdims=True)
    else:
        raise ValueError(f"prior: expected one of {', '.join(get_args(Prior))}, got {prior!r}")
    return torch.from_numpy((values * scale).astype(np.float32))


def sample_each(prior: Prior, seeds: Iterable[Seed], latent_dim: int, scale: float = 1.0) -> Tensor:
    """One latent per seed, float32 [N, latent_dim]: row i depends on seed i alone, not on the batch."""
    rows = [sample(prior, seed, (latent_dim,), scale) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, latent_dim)


Sample = Callable[[int, int], Tensor]
"""(seed, count) -> latents, float32 [count, L] on the CPU."""


@dataclass(frozen=True)
class NamedPrior:
    """A `Sample` of a named prior."""

    name: Prior
    latent_dim: int

    def __call__(self, seed: int, count: int) -> Tensor:
        """Draw latents float32 [count, latent_dim] from one seed."""
        return sample(self.name, seed, (count, self.latent_dim))


def each(draw: Sample, seeds: Sequence[int]) -> Tensor:
    """One latent per seed, [N, L]: row i depends on seed i alone, not on the batch. At once by `draw.each`, if any."""
    if not len(seeds):
        return draw(0, 0)
    at_once = getattr(draw, "each", None)
    return at_once(seeds) if at_once else torch.cat([draw(seed, 1) for seed in seeds])
