"""z' = z + sum_s alpha_s w_s, walks w learned by the steering stage, step sizes alpha drawn anew for every pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from copgen_fast.config import SteeringConfig
from copgen_fast.files import sha256
from copgen_fast.options import CountOrZero, Range
from copgen_fast.positives import PositiveFunction, Setting, _groups
from copgen_fast.positives._distance import DRAWS, Scaled, scale_to
from copgen_fast.positives._warps import NAMES, Limits, amounts, limits_of, steps, words
from copgen_fast.runtime import artifacts, seeds


@dataclass(frozen=True)
class Config(Scaled):
    """Options of steering positives."""

    groups: tuple[CountOrZero, ...] = ()
    """Move only these latent groups, counted from 0; (): all."""
    scales: tuple[Annotated[float, Range(-1e3, 1e3)], ...] = ()
    """One factor of the displacement for each of `groups`, or for each of all groups if none are chosen."""


class Walks(nn.Module):
    """A direction w_s [L] for each transformation s.

    Args:
        names: of the transformations.
        std: of the directions' coordinates at first; 0: they start at zero.
        factors: [L], 1 where walks may go and 0 elsewhere; None: everywhere.
    """

    def __init__(self, latent_dim: int, names: Sequence[str], std: float = 0.0, factors: Tensor | None = None) -> None:
        super().__init__()
        self.names = tuple(names)  # in their order, which a ParameterDict made from a dict does not keep
        free = torch.ones(latent_dim) if factors is None else factors
        self.walk = nn.ParameterDict({name: std * torch.randn(latent_dim) * free for name in names})
        self.register_buffer("free", free, persistent=False)

    def forward(self, alpha: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Displacements dz [N, L] by step sizes alpha [N, S] along all walks, or along those of `names`."""
        directions = torch.stack([self.walk[name] for name in names or self.names])
        return alpha @ (directions * self.free)


def unlearned(latent_dim: int, latent_groups: Sequence[int], config: SteeringConfig, seed: int) -> Walks:
    """Walks as the steering stage starts them."""
    factors = _groups.factors(latent_dim, latent_groups, config.groups)
    with seeds.seeded(seed, "steering walks"):
        return Walks(latent_dim, tuple(limits_of(config)), 0.1 if config.init == "normal" else 0.0, factors)


def learned(latent_dim: int, config: SteeringConfig, path: Path) -> Walks:
    """Walks as the steering stage left them.

    Raises:
        UsageError: it did not run.
        CorruptArtifactError: they are of other transformations, or another generator's.
    """
    limits = limits_of(config)
    tensors = artifacts.read_tensors(artifacts.require(path, "steering"), limits=words(limits))
    walks = Walks(latent_dim, tuple(limits))
    artifacts.load_strictly(walks, tensors, path)
    return walks


def draw_steps(limits: Limits, streams: Iterable[seeds.Seed], count: int = 1) -> Tensor:
    """Step sizes [N * count, S], `count` from each of N streams of random numbers."""
    drawn = [random.uniform(size=(count, len(NAMES))) for random in seeds.random_states(streams)]
    return steps(amounts(torch.from_numpy(np.concatenate(drawn)), limits), limits).float()


def build(setting: Setting) -> PositiveFunction:
    options, limits = setting.options, limits_of(setting.steering)
    walks = learned(setting.latent_dim, setting.steering, setting.steering_file)
    factors = _groups.factors(setting.latent_dim, setting.latent_groups, options.groups, options.scales)

    @torch.inference_mode()
    def displacement(alpha: Tensor) -> Tensor:
        dz = walks(alpha)
        return dz if factors is None else dz * factors

    def displacements() -> Iterator[Tensor]:
        yield displacement(draw_steps(limits, [(0, 3)], DRAWS))

    scale = scale_to(options.distance, "steering", displacements())

    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        # z is drawn from the stream (seed), Gaussian noise from (seed, 1).
        streams = [(seed, 2) for seed in seeds]
        return z + scale * displacement(draw_steps(limits, streams)) if streams else z.clone()

    return positive


def record(setting: Setting) -> dict[str, Any]:
    options = {name: value for name, value in vars(setting.options).items() if value not in (None, ())}
    digest = sha256(setting.steering_file)
    return {"steering_digest": digest, "step_limits": limits_of(setting.steering)} | options
