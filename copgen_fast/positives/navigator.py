"""z' = z + T_z(z), the paper's way: T_z is learned by the navigator stage (Section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from copgen_fast.config import NavigatorConfig
from copgen_fast.files import sha256
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.runtime import artifacts, seeds


class Navigator(nn.Module):
    """The navigator T_z: two affine layers of the latent's width, with a ReLU between them unless linear.

    PyTorch's default initialisation, as in the reference code; with the learning rate it is what keeps dz short.

    Args:
        radius: project every dz onto the ball of this radius; None: leave it.
    """

    def __init__(self, latent_dim: int, kind: str = "nonlinear", radius: float | None = None) -> None:
        super().__init__()
        activation = [nn.ReLU(inplace=True)] if kind == "nonlinear" else []
        self.walker = nn.Sequential(nn.Linear(latent_dim, latent_dim), *activation, nn.Linear(latent_dim, latent_dim))
        self.latent_dim = latent_dim
        self.radius = radius

    def forward(self, z: Tensor) -> Tensor:
        """Displacement dz = T_z(z), [N, L], of latents [N, L]; the positive is z + dz."""
        dz = self.walker(expect_tensor("z", z, ("N", self.latent_dim)))
        if self.radius is None:
            return dz
        return dz * (self.radius / dz.norm(dim=1, keepdim=True).clamp_min(self.radius))


def untrained(latent_dim: int, config: NavigatorConfig, seed: int) -> Navigator:
    """T_z as the navigator stage starts it: the same weights for the same seed."""
    with seeds.seeded(seed, "navigator"):
        return Navigator(latent_dim, config.kind, config.delta if config.project else None)


def as_positive(navigator: Navigator) -> PositiveFunction:
    @torch.inference_mode()
    def positive(z, seeds):  # noqa: ANN001, ANN202 (PositiveFunction)
        return z + navigator(z)

    return positive


def build(setting: Setting) -> PositiveFunction:
    navigator = untrained(setting.latent_dim, setting.navigator, setting.seed)
    path = artifacts.require(setting.navigator_file, "navigator")
    artifacts.load_strictly(navigator, artifacts.read_tensors(path), path)
    return as_positive(navigator)


def record(setting: Setting) -> dict[str, Any]:
    return {"navigator_digest": sha256(setting.navigator_file)}
