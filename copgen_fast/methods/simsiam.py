"""SimSiam: a predictor of one view's embedding from the other's, which takes no gradient (Chen and He 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from copgen_fast.encoders import Encoder
from copgen_fast.methods import Method
from copgen_fast.methods._collapse import embedding_std
from copgen_fast.methods._heads import cosine, mlp, per_view, predictor_apart
from copgen_fast.options import Count, check_ranges


@dataclass(frozen=True)
class Config:
    """Options of SimSiam."""

    hidden: Count = 2048
    """Width of the projector's two hidden layers."""
    dim: Count = 2048
    """Dimension of embeddings."""
    predictor_hidden: Count = 512
    """Width of the predictor's hidden layer."""
    fixed_predictor_lr: bool = True
    """Keep the predictor's learning rate at its peak."""
    joint: bool = False
    """One forward of both views, which then share batch norm's statistics, rather than one of each."""

    def __post_init__(self) -> None:
        check_ranges(self)


class SimSiam(Method):
    """Encoder, projector of three layers and predictor of two."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.projector = mlp(encoder.feature_dim, config.hidden, config.hidden, config.dim, last="norm without weights")
        self.predictor = mlp(config.dim, config.predictor_hidden, config.dim)
        self._metrics: dict[str, Tensor] = {}

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """Embeddings z and predictions p."""
        return per_view(self._outputs, v, self.config.joint)

    def _outputs(self, v: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.encoder(v))
        return z, self.predictor(z)

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """-(cos(p1, z2) + cos(p2, z1)) / 2, mean over pairs."""
        (z1, z2), (p1, p2) = (x.chunk(2) for x in online)
        self._metrics = {"embedding_std": embedding_std(online[0], group)}
        return -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics

    def param_groups(self) -> list[dict[str, Any]]:
        return predictor_apart((self.encoder, self.projector), self.predictor, self.config.fixed_predictor_lr)


def build(encoder: Encoder, config: Config) -> SimSiam:
    return SimSiam(encoder, config)
