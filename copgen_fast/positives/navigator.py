"""z' = z + T_z(z), the paper's way: T_z is learned by the navigator stage (Section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from copgen_fast.config import NavigatorConfig
from copgen_fast.errors import UsageError
from copgen_fast.files import sha256
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.positives import PositiveFunction, Setting, _groups
from copgen_fast.positives._distance import DRAWS, PART, Scaled, scale_to
from copgen_fast.runtime import artifacts, seeds
from copgen_fast.runtime.latents import NamedPrior

CHANNELS = 64
"""Between the convolutions of a convolutional T_z, by default."""


@dataclass(frozen=True)
class Config(Scaled):
    """Options of a navigator's positives."""

    centered: bool = False
    """Subtract E[T_z(z)], the offset that all latents share, before any scaling."""


class Navigator(nn.Module):
    """The navigator T_z: two affine layers, or two 3 x 3 convolutions (conv), with a ReLU between them unless linear.

    PyTorch's default initialisation, as in the reference code; with the learning rate it is what keeps dz short.

    Args:
        radius: project every dz onto the ball of this radius; None: leave it.
        hidden: width between the layers; None: the latent's, or 64 channels.
        sizes: of the latent's groups.
        radii: project each group's part of dz onto a ball; 0: z stays as it is there, infinity: dz does.
        shape: (C, h, w) of a latent that conv takes as an image.
    """

    def __init__(
        self,
        latent_dim: int,
        kind: str = "nonlinear",
        radius: float | None = None,
        hidden: int | None = None,
        sizes: Sequence[int] = (),
        radii: Sequence[float] = (),
        shape: Sequence[int] = (),
    ) -> None:
        super().__init__()
        activation = [] if kind == "linear" else [nn.ReLU(inplace=True)]
        if kind == "conv":
            width, channels = hidden or CHANNELS, shape[0]
            first, last = (nn.Conv2d(*ends, 3, padding=1) for ends in ((channels, width), (width, channels)))
            layers = [nn.Unflatten(1, tuple(shape)), first, *activation, last, nn.Flatten()]
        else:
            width = hidden or latent_dim
            layers = [nn.Linear(latent_dim, width), *activation, nn.Linear(width, latent_dim)]
        self.walker = nn.Sequential(*layers)
        self.latent_dim = latent_dim
        self.radius = radius
        self.sizes, self.radii = list(sizes), tuple(radii)

    def forward(self, z: Tensor) -> Tensor:
        """Displacement dz = T_z(z), [N, L], of latents [N, L]; the positive is z + dz."""
        dz = self.walker(expect_tensor("z", z, ("N", self.latent_dim)))
        if self.radii:
            parts = zip(dz.split(self.sizes, dim=1), self.radii, strict=True)
            dz = torch.cat([_held(part, radius) for part, radius in parts], dim=1)
        return dz if self.radius is None else _held(dz, self.radius)


def _held(dz: Tensor, radius: float) -> Tensor:
    """Rows projected onto the ball of `radius`; 0 makes them zero, infinity leaves them."""
    if radius == math.inf:
        return dz
    return dz * (radius / dz.norm(dim=1, keepdim=True).clamp_min(radius)) if radius else torch.zeros_like(dz)


def untrained(
    latent_dim: int,
    config: NavigatorConfig,
    seed: int,
    latent_groups: Sequence[int] = (),
    latent_shape: Sequence[int] = (),
) -> Navigator:
    """T_z as the navigator stage starts it: the same weights for the same seed.

    Raises:
        UsageError: a convolutional one for latents that are not [C, h, w]; a ball whose radius is not found yet.
    """
    if config.project and config.delta == "auto":
        raise UsageError("navigator.delta: auto is found by the navigator stage: run `--stages navigator` first")
    if config.kind == "conv" and len(latent_shape) != 3:
        shape = list(latent_shape or (latent_dim,))
        raise UsageError(f"navigator.kind: conv needs a generator of latents [C, h, w], its are {shape}: take another")
    radii = ()
    if config.groups or config.group_deltas:
        radii = _groups.by_group(latent_groups, config.groups, config.group_deltas, math.inf)
    radius = config.delta if config.project else None
    with seeds.seeded(seed, "navigator"):
        sizes = latent_groups or (latent_dim,)
        T_z = Navigator(latent_dim, config.kind, radius, config.hidden, sizes, radii, latent_shape)
        if config.init == "near-zero":
            for layer in (layer for layer in T_z.walker if isinstance(layer, (nn.Linear, nn.Conv2d))):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.uniform_(layer.bias, -0.001, 0.001)
    return T_z


def start(setting: Setting) -> Navigator:
    """The untrained T_z of a setting."""
    shape = setting.latent_shape
    return untrained(setting.latent_dim, setting.navigator, setting.seed, setting.latent_groups, shape)


def as_positive(navigator: Navigator, way: str, setting: Setting) -> PositiveFunction:
    """z + T_z(z) or, by the options, z + s (T_z(z) - offset), with the s that their distance takes."""
    offset = _offset(navigator, setting) if getattr(setting.options, "centered", False) else torch.zeros(())
    scale = scale_to(_distance(setting), way, (dz - offset for dz in _displacements(navigator, setting)))
    offset = offset.float()

    @torch.inference_mode()
    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        return z + scale * (navigator(z) - offset)

    return positive


@torch.inference_mode()
def _displacements(navigator: Navigator, setting: Setting) -> Iterator[Tensor]:
    """T_z of always the same latents of the prior, in float64, so that no rounding shows in the scale."""
    T_z, sample = copy.deepcopy(navigator).double(), setting.sample or NamedPrior("truncnorm", setting.latent_dim)
    for part in range(DRAWS // PART):
        yield T_z(sample(seeds.derive32("distance", part), PART).double())


@torch.inference_mode()
def _offset(navigator: Navigator, setting: Setting) -> Tensor:
    """The mean of T_z, float64 [L]."""
    return sum(dz.sum(0) for dz in _displacements(navigator, setting)) / DRAWS


def build(setting: Setting) -> PositiveFunction:
    navigator = start(setting)
    path = artifacts.require(setting.navigator_file, "navigator")
    tensors = artifacts.read_tensors(path)
    first = tensors.get("walker.0.weight")
    if first is not None and first.ndim == 2 and first.shape[1] != setting.latent_dim:
        raise UsageError(
            f"{path} is a navigator for latents of length {first.shape[1]}, and the generator's have length "
            f"{setting.latent_dim}: take the generator that it was trained with, or train another one in another --out"
        )
    artifacts.load_strictly(navigator, tensors, path)
    return as_positive(navigator, "navigator", setting)


def record(setting: Setting) -> dict[str, Any]:
    return {"navigator_digest": sha256(setting.navigator_file)} | held(setting)


def held(setting: Setting) -> dict[str, Any]:
    """What decides T_z's positives besides its weights, where it isn't the default: groups, centring, a scale."""
    found = {name: value for name in ("groups", "group_deltas") if (value := getattr(setting.navigator, name))}
    found |= {"centered": True} if getattr(setting.options, "centered", False) else {}
    return found | ({} if (distance := _distance(setting)) is None else {"distance": distance})


def _distance(setting: Setting) -> float | None:
    return getattr(setting.options, "distance", None)
