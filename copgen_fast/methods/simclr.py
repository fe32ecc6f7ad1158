"""SimCLR: symmetric NT-Xent between the two views of each pair (Chen et al. 2020; paper Eq. 1).

Several positives of an anchor: all its views are positives of each other, by the mean of their terms, outside the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.encoders import Encoder, projection_head
from copgen_fast.methods import Method
from copgen_fast.methods._jigsaw import Jigsaw
from copgen_fast.methods._nt_xent import nt_xent, one_sided
from copgen_fast.options import Range, Temperature, check_ranges

SEVERAL_POSITIVES = True


@dataclass(frozen=True)
class Config:
    """Options of SimCLR."""

    temperature: Temperature = 0.1
    """Temperature of NT-Xent."""
    base_temperature: Temperature | None = 0.07
    """The loss is multiplied by temperature / base_temperature, as in the reference code; None: by 1."""

    jigsaw: Annotated[float, Range(0, 1)] = 0.0
    """Weight b of InfoMin's jigsaw branch, whose code has 0.5: the loss is (1 - b) L + b L', L' one-sided InfoNCE of an
    anchor's nine shuffled pieces and its positives. 0: no branch."""

    def __post_init__(self) -> None:
        check_ranges(self)


class SimCLR(Method):
    """Encoder and projection head D-D-128."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.feature_dim)
        self.config = config
        self._metrics: dict[str, Tensor] = {}
        self.jigsaw = config.jigsaw > 0
        if self.jigsaw:
            self.branch = Jigsaw(encoder.feature_dim)

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of the views, and of the jigsaw views where there is that branch."""
        if not self.jigsaw:
            return (self.head(self.encoder(v)),)
        pieces = len(v) // (2 + self.positives)
        return self.head(self.encoder(v[:-pieces])), self.branch(self.encoder, v[-pieces:])

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        factors = self.config.temperature, self.config.base_temperature
        loss = nt_xent(online[0], *factors, labels, group, self.positives)
        if labels is None and self.positives == 1:
            candidates = len(online[0]) * (1 if group is None else dist.get_world_size(group)) - 1
            factor = self.config.temperature / (self.config.base_temperature or self.config.temperature)
            self._metrics = {"mi_lower_bound": math.log(candidates) - loss.detach() / factor}
        if not self.jigsaw:
            return loss
        by_pieces = one_sided(*online, *factors, labels, group, self.positives)
        return torch.lerp(loss, by_pieces, self.config.jigsaw)

    def metrics(self) -> dict[str, Tensor]:
        """log K - NT-Xent over K candidates, at most the views' mutual information in nats (van den Oord et al. 2018);
        of one positive and without classes.
        """
        return self._metrics


def build(encoder: Encoder, config: Config) -> SimCLR:
    return SimCLR(encoder, config)
