"""Training steps of lightly's modules (heads, losses, memory banks, moving averages), with our encoder and views."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import NNMemoryBankModule, heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from copgen_fast.config import PretrainConfig


class LightlySteps:
    """Steps of SGD on a copy of the encoder by one of lightly's methods; options are those of its examples, sizes ours.

    Args:
        method: nnclr, moco, simsiam or byol.
        encoder: our encoder, which is copied.
        views: makes the views [2N, 3, H, W] of a step, anchors first.
    """

    def __init__(
        self, method: str, encoder: nn.Module, views: Callable[[], Tensor], options: PretrainConfig, queue: int
    ) -> None:
        self.views, self.queue = views, queue
        self.encoder = copy.deepcopy(encoder).train()
        device, dim = next(encoder.parameters()).device, encoder.feature_dim
        self.head = self.predictor = self.target = None
        self.loss = getattr(self, f"_make_{method}")(dim, device)
        modules = [part for part in (self.encoder, self.head, self.predictor) if part is not None]
        parameters = [parameter for part in modules for parameter in part.to(device).parameters()]
        momentum, decay = options.momentum, options.weight_decay
        self.sgd = torch.optim.SGD(parameters, options.lr, momentum, weight_decay=decay)

    def step(self) -> Tensor:
        """One iteration; its loss."""
        v1, v2 = self.views().chunk(2)
        loss = self.loss(v1, v2)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.detach()

    def _both(self, v1: Tensor, v2: Tensor) -> list[Tensor]:
        return [self.head(self.encoder(v)) for v in (v1, v2)]

    def _make_simsiam(self, dim: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        self.head, self.predictor = heads.SimSiamProjectionHead(dim), heads.SimSiamPredictionHead()
        criterion = NegativeCosineSimilarity()

        def loss(v1: Tensor, v2: Tensor) -> Tensor:
            z1, z2 = self._both(v1, v2)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            return (criterion(p1, z2.detach()) + criterion(p2, z1.detach())) / 2

        return loss

    def _make_byol(self, dim: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        self.head, self.predictor = heads.BYOLProjectionHead(dim), heads.BYOLPredictionHead()
        self._average(device)
        criterion = NegativeCosineSimilarity()

        def loss(v1: Tensor, v2: Tensor) -> Tensor:
            self._follow(0.99)
            p1, p2 = (self.predictor(z) for z in self._both(v1, v2))
            with torch.no_grad():
                z1, z2 = self.target(v1), self.target(v2)
            return 2 * (criterion(p1, z2) + criterion(p2, z1))

        return loss

    def _make_moco(self, dim: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        self.head = heads.MoCoProjectionHead(dim, dim, 128)
        self._average(device)
        self.criterion = NTXentLoss(0.2, (self.queue, 128)).to(device)

        def loss(v1: Tensor, v2: Tensor) -> Tensor:
            self._follow(0.999)
            q = self.head(self.encoder(v1))
            with torch.no_grad():
                k = self.target(v2)
            return self.criterion(q, k)

        return loss

    def _make_nnclr(self, dim: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        self.head, self.predictor = heads.NNCLRProjectionHead(dim), heads.NNCLRPredictionHead()
        bank, criterion = NNMemoryBankModule((self.queue, 256)).to(device), NTXentLoss(0.1)

        def loss(v1: Tensor, v2: Tensor) -> Tensor:
            z1, z2 = self._both(v1, v2)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            n1, n2 = bank(z1.detach()), bank(z2.detach(), update=True)
            return (criterion(n1, p2) + criterion(n2, p1)) / 2

        return loss

    def _average(self, device: torch.device) -> None:
        """Make the moving average of encoder and head."""
        self.online = nn.Sequential(self.encoder, self.head).to(device)
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)

    def _follow(self, decay: float) -> None:
        update_momentum(self.online, self.target, decay)
