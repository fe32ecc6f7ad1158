"""BYOL: predictions of a moving average network's embedding of the other view (Grill et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch.distributed as dist
from torch import Tensor

from copgen_fast.encoders import Encoder
from copgen_fast.methods import Method
from copgen_fast.methods._collapse import embedding_std
from copgen_fast.methods._ema import Ema, rising
from copgen_fast.methods._heads import cosine, mlp, per_view, predictor_apart
from copgen_fast.options import Count, Range, check_ranges


@dataclass(frozen=True)
class Config:
    """Options of BYOL."""

    hidden: Count = 4096
    """Width of the projector's hidden layer."""
    dim: Count = 256
    """Dimension of embeddings."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    ema: Annotated[float, Range(0, 1)] = 0.99
    """Decay of the moving average at the start; it rises to 1 along a cosine. The paper's: 0.99 for up to 300
    epochs, 0.996 for 1000."""
    fixed_predictor_lr: bool = False
    """Keep the predictor's learning rate at its peak."""
    joint: bool = False
    """One forward of both views, which then share batch norm's statistics, rather than one of each."""

    def __post_init__(self) -> None:
        check_ranges(self)


class BYOL(Method):
    """Encoder, projector and predictor, and the moving average of the first two, which starts as their copy."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.projector = mlp(encoder.feature_dim, config.hidden, config.dim)
        self.predictor = mlp(config.dim, config.predictor_hidden, config.dim)
        self.target = Ema(self.encoder, self.projector)
        self._metrics: dict[str, Tensor] = {}

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """Predictions p."""
        return per_view(lambda x: (self.predictor(self.projector(self.encoder(x))),), v, self.config.joint)

    def targets(self, v: Tensor) -> tuple[Tensor, ...]:
        """The moving average's embeddings z, with statistics of the batch in its batch norm too."""
        return per_view(lambda x: (self.target(x),), v, self.config.joint)

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 - 2 cos(p1, z2)) + (2 - 2 cos(p2, z1)), mean over pairs."""
        (p1, p2), (z1, z2) = online[0].chunk(2), targets[0].chunk(2)
        self._metrics = {"embedding_std": embedding_std(targets[0], group)}
        return 4 - 2 * (cosine(p1, z2) + cosine(p2, z1))

    def after_step(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], progress: float) -> None:
        self.target.update(rising(self.config.ema, progress), self.encoder, self.projector)

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics

    def param_groups(self) -> list[dict[str, Any]]:
        return predictor_apart((self.encoder, self.projector), self.predictor, self.config.fixed_predictor_lr)


def build(encoder: Encoder, config: Config) -> BYOL:
    return BYOL(encoder, config)
