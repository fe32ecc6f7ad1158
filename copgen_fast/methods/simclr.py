"""SimCLR: symmetric NT-Xent between the two views of each pair (Chen et al. 2020; paper Eq. 1).

Several positives of an anchor: all its views are positives of each other, by the mean of their terms, outside the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from copgen_fast.encoders import Encoder, projection_head
from copgen_fast.methods import Method
from copgen_fast.methods._nt_xent import nt_xent
from copgen_fast.options import Temperature, check_ranges

SEVERAL_POSITIVES = True


@dataclass(frozen=True)
class Config:
    """Options of SimCLR."""

    temperature: Temperature = 0.1
    """Temperature of NT-Xent."""
    base_temperature: Temperature | None = 0.07
    """The loss is multiplied by temperature / base_temperature, as in the reference code; None: by 1."""

    def __post_init__(self) -> None:
        check_ranges(self)


class SimCLR(Method):
    """Encoder and projection head D-D-128."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.feature_dim)
        self.config = config

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        return (self.head(self.encoder(v)),)

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        factors = self.config.temperature, self.config.base_temperature
        return nt_xent(online[0], *factors, labels, group, self.positives)


def build(encoder: Encoder, config: Config) -> SimCLR:
    return SimCLR(encoder, config)
