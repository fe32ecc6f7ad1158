"""NNCLR: InfoNCE of one view's nearest neighbour in a support set and the other's prediction (Dwibedi et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.encoders import Encoder
from copgen_fast.methods import Method, Setting
from copgen_fast.methods._heads import full, mlp, per_view
from copgen_fast.methods._queue import SIZE, Queue, fitted
from copgen_fast.ops import info_nce
from copgen_fast.options import Count, Temperature, check_ranges

USES_LABELS = True


@dataclass(frozen=True)
class Config:
    """Options of NNCLR."""

    temperature: Temperature = 0.1
    """Temperature of InfoNCE."""
    base_temperature: Temperature | None = None
    """The loss is multiplied by temperature / base_temperature; None, as published: by 1. SimCLR has 0.07 here."""
    queue: Count | None = None
    """Rows of the support set; None: 65536, or the largest power of two in a quarter of a smaller data set. Any number
    goes with any batch."""
    hidden: Count = 2048
    """Width of the projector's two hidden layers."""
    dim: Count = 256
    """Dimension of embeddings."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    joint: bool = False
    """One forward of both views, which then share batch norm's statistics, rather than one of each."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def for_run(self, setting: Setting) -> Config:
        return fitted(self, setting, setting.batch)


class NNCLR(Method):
    """Encoder, projector of three layers, predictor of two, and the support set of anchors' embeddings."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.projector = mlp(encoder.feature_dim, config.hidden, config.hidden, config.dim, last="norm")
        self.predictor = mlp(config.dim, config.predictor_hidden, config.dim)
        self.queue = Queue(config.queue or SIZE, config.dim)
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
        """Mean of -log softmax(nn(z1) p2' / t) and -log softmax(nn(z2) p1' / t) at each row's own prediction, over the
        predictions of all ranks.

        Neighbours are those among earlier batches' anchors, and take no gradient.
        """
        z, p = (full(x) for x in online)
        found = self.queue.nearest(F.normalize(z.detach(), dim=1))
        neighbours = self.queue.rows[found].to(p.dtype)
        self._metrics = {}
        if labels is not None:
            self._metrics["neighbour_accuracy"] = (self.queue.labels[found] == labels.repeat(2)).float().mean()
        self.queue.offer(z.chunk(2)[0], labels, group)
        losses = [
            info_nce(
                nn,
                of_other,
                temperature=self.config.temperature,
                base_temperature=self.config.base_temperature,
                symmetric=False,
                group=group,
                equal_batches=True,
            )
            for nn, of_other in zip(neighbours.chunk(2), p.chunk(2)[::-1], strict=True)
        ]
        return torch.stack(losses).mean()

    def after_step(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], progress: float) -> None:
        self.queue.take_in()
        self._metrics["queue_unwritten"] = self.queue.unwritten()

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics


def build(encoder: Encoder, config: Config) -> NNCLR:
    return NNCLR(encoder, config)
