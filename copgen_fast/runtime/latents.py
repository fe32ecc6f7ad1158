"""Sampling of latents z from named priors, with one seed for each latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from copgen_fast.config import Prior
from copgen_fast.runtime.seeds import Seed, random_states


def sample(prior: Prior, seed: Seed, size: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Draw float32 latents of shape `size` from one seed.

    `truncnorm` inverts the distribution function of N(0, 1) truncated to [-2, 2] at
    u = RandomState(seed).uniform(size), as BigGAN's and the reference code's `truncated_noise_sample`: after the cast
    to float32 it is bit-identical to scipy.stats.truncnorm.rvs(-2, 2, scale=scale, random_state=seed). `normal` is
    N(0, 1); `uniform` lies in [-1, 1]; `sphere` is normal, each row (the last dimension) scaled to the norm sqrt(L).

    Args:
        seed: see `Seed`.
    """
    (random,) = random_states([seed])
    return _latents(prior, _numbers(prior, random, size), scale)


def sample_each(prior: Prior, seeds: Iterable[Seed], latent_dim: int, scale: float = 1.0) -> Tensor:
    """One latent per seed, float32 [N, latent_dim]: row i depends on seed i alone, not on the batch.

    It has the bits of `sample(prior, seeds[i], (latent_dim,), scale)`.
    """
    rows = [_numbers(prior, random, (latent_dim,)) for random in random_states(seeds)]
    return _latents(prior, np.stack(rows), scale) if rows else torch.empty(0, latent_dim)


def _numbers(prior: Prior, random: np.random.RandomState, size: tuple[int, ...]) -> np.ndarray:
    """The random numbers that latents are made of, float64."""
    if prior not in get_args(Prior):
        raise ValueError(f"prior: expected one of {', '.join(get_args(Prior))}, got {prior!r}")
    if prior == "truncnorm":
        return random.uniform(size=size)
    return random.uniform(-1, 1, size) if prior == "uniform" else random.standard_normal(size)


def _latents(prior: Prior, values: np.ndarray, scale: float) -> Tensor:
    """Latents [..., L] of a prior's random numbers, float32."""
    from scipy.special import ndtr, ndtri

    if prior == "truncnorm":
        low, high = ndtr(-2.0), ndtr(2.0)
        values = ndtri(low + values * (high - low))
    elif prior == "sphere":
        values *= np.sqrt(values.shape[-1]) / np.linalg.norm(values, axis=-1, keepdims=True)
    return torch.from_numpy((values * scale).astype(np.float32))


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

    def each(self, seeds: Sequence[int]) -> Tensor:
        """Draw one latent per seed, float32 [N, latent_dim], with the bits of a call for each."""
        return sample_each(self.name, seeds, self.latent_dim)


def each(draw: Sample, seeds: Sequence[int]) -> Tensor:
    """One latent per seed, [N, L]: row i depends on seed i alone, not on the batch. At once by `draw.each`, if any."""
    if not len(seeds):
        return draw(0, 0)
    at_once = getattr(draw, "each", None)
    return at_once(seeds) if at_once else torch.cat([draw(seed, 1) for seed in seeds])
