"""Random inputs of the navigator's steps, drawn on the CPU from seeds: the steps themselves draw nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copgen_fast import augmentations
from copgen_fast.config import RunConfig
from copgen_fast.ops import AugmentParams
from copgen_fast.runtime import devices, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.latents import NamedPrior


@dataclass(frozen=True)
class Batch:
    """Inputs of one navigator step, on the device.

    Attributes:
        z: latents [N, L].
        params, params_prime: of the augmentations t_x and t_x', N rows each.
        labels: classes [N] of a conditional generator's images; an anchor and its positive share theirs.
    """

    z: Tensor
    params: AugmentParams
    params_prime: AugmentParams
    labels: Tensor | None = None


def draw_latents(G: nn.Module, seed: int, count: int, device: torch.device) -> Tensor:
    """Latents [count, L] of the generator's prior (of a bare module truncnorm), on `device`."""
    sample = getattr(G, "sample", None) or NamedPrior("truncnorm", G.latent_dim)
    return devices.send(sample(seed, count), device)


def draw_labels(G: nn.Module, count: int, device: torch.device, *key: seeds.Key) -> Tensor | None:
    """Uniform classes [count] of a conditional generator, on `device`; None of another."""
    if not G.classes:
        return None
    return devices.send(torch.randint(G.classes, (count,), generator=seeds.generator(*key)), device)


def draw_batch(config: RunConfig, G: nn.Module, index: int, device: torch.device, ranks: Ranks = ALONE) -> Batch:
    """The batch of step `index`, this rank's rows of it: the same whatever the device and the number of ranks."""
    options = config.navigator
    z = draw_latents(G, seeds.derive32(config.seed, "navigator latents", index), options.batch, device)
    params = AugmentParams.sample(
        2 * options.batch,
        G.image_shape[1:],
        augmentations.get(options.augmentation),
        out_size=options.view_size,
        generator=seeds.generator(config.seed, "navigator views", index),
    )
    labels = draw_labels(G, options.batch, device, config.seed, "navigator labels", index)
    rows = ranks.rows(options.batch)
    own = devices.send(params if ranks.alone else params[ranks.joint_rows(options.batch)], device)
    n = len(own) // 2
    return Batch(z[rows], own[:n], own[n:], None if labels is None else labels[rows])
