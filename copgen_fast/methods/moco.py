"""MoCo v2: InfoNCE of anchors against a moving average encoder's positives and a queue of past ones (Chen et al. 2020).

Where the published code shuffles batches between GPUs, so that batch norm tells no pair, statistics of both encoders
are those of the whole batch here (--bn sync).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.encoders import Encoder, projection_head
from copgen_fast.methods import Method, Setting
from copgen_fast.methods._ema import Ema
from copgen_fast.methods._heads import full
from copgen_fast.methods._jigsaw import Jigsaw
from copgen_fast.methods._queue import SIZE, Queue, fitted
from copgen_fast.ops import info_nce
from copgen_fast.options import Count, Range, Temperature, check_ranges


@dataclass(frozen=True)
class Config:
    """Options of MoCo v2."""

    temperature: Temperature = 0.2
    """Temperature of InfoNCE."""
    queue: Count | None = None
    """Rows of the queue; None: 65536, or the largest power of two in a quarter of a smaller data set. Any number goes
    with any batch."""
    ema: Annotated[float, Range(0, 1)] = 0.999
    """Decay of the moving average."""
    symmetric: bool = False
    """Positives as queries for anchors, too: twice the work, and the queue then gets both. MoCo's is one-sided."""

    jigsaw: Annotated[float, Range(0, 1)] = 0.0
    """Weight b of InfoMin's jigsaw branch, whose code has 0.5: the loss is (1 - b) L + b L', L' that of nine shuffled
    pieces of an anchor as the query. 0: no branch."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def for_run(self, setting: Setting) -> Config:
        return fitted(self, setting, setting.batch * (1 + self.symmetric))


class MoCo(Method):
    """Encoder and projection head D-D-128, their moving average, and the queue of its keys."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.head = projection_head(encoder.feature_dim)
        self.key = Ema(self.encoder, self.head)
        self.queue = Queue(config.queue or SIZE, self.head[-1].out_features)
        self.jigsaw = config.jigsaw > 0
        if self.jigsaw:
            self.branch = Jigsaw(encoder.feature_dim)

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """Queries: of the anchors, then, if symmetric, of the positives; and those of the jigsaw views, if any."""
        queries = torch.cat([self.head(self.encoder(x)) for x in self._of(self._views(v))])
        return (queries, self.branch(self.encoder, v.chunk(3)[2])) if self.jigsaw else (queries,)

    def targets(self, v: Tensor) -> tuple[Tensor, ...]:
        """Keys of the queries' other views, by the average of the weights that the last step left."""
        return (torch.cat([self.key(x) for x in self._of(self._views(v)[::-1])]),)

    def _views(self, v: Tensor) -> tuple[Tensor, ...]:
        return v.chunk(2 + self.jigsaw)[:2]

    def _of(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return views if self.config.symmetric else views[:1]

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Cross-entropy over each query's own key and the queue; the batch's other keys are no negatives."""
        q, k = (F.normalize(full(x), dim=1) for x in (online[0], *targets))
        self.queue.offer(targets[0], None, group)
        loss = self.contrast(q, k, group)
        if not self.jigsaw:
            return loss
        pieces = F.normalize(full(online[1]), dim=1)
        return torch.lerp(loss, self.contrast(pieces, k[: len(pieces)], group), self.config.jigsaw)

    def contrast(self, q: Tensor, k: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The loss of unit queries and keys against the queue."""
        options = {"temperature": self.config.temperature, "in_batch": False, "symmetric": False, "normalize": False}
        return info_nce(q, k, negatives=self.queue.rows, **options)

    def after_step(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], progress: float) -> None:
        self.queue.take_in()
        self.key.update(self.config.ema, self.encoder, self.head)

    def metrics(self) -> dict[str, Tensor]:
        return {"queue_unwritten": self.queue.unwritten()}


def build(encoder: Encoder, config: Config) -> MoCo:
    return MoCo(encoder, config)
