"""Peers of the fused NT-Xent: plain PyTorch, lightly, the published SupConLoss, our chunked backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import optional
from copgen_fast import __version__
from copgen_fast.ops import info_nce
from copgen_fast.runtime.machine import version

Peer = Callable[[Tensor, Tensor], Tensor]


def peers(temperature: float) -> dict[str, Peer]:
    """Losses of anchors and positives [N, D] by name, all of which keep the 2N x 2N matrix."""
    found: dict[str, Peer] = {f"PyTorch {version('torch')}, written plainly": plain(temperature)}
    with optional("lightly"):
        from lightly.loss import NTXentLoss

        found[f"lightly {version('lightly')} NTXentLoss"] = NTXentLoss(temperature=temperature)
    return found | {"SupConLoss as published": published(temperature)}


def tiled(temperature: float) -> dict[str, Peer]:
    """Tiles of rows in PyTorch, without the symmetry, as in Inf-CL; they keep no matrix."""

    def chunked(anchors: Tensor, positives: Tensor) -> Tensor:
        return info_nce(anchors, positives, temperature=temperature, backend="chunked")

    return {f"copgen_fast {__version__} chunked backend, no symmetry": chunked}


def plain(temperature: float) -> Peer:
    """NT-Xent by cross-entropy over the whole matrix."""

    def run(anchors: Tensor, positives: Tensor) -> Tensor:
        views = F.normalize(torch.cat([anchors, positives]), dim=1)
        logits = views @ views.T / temperature
        logits.fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(views), device=views.device).roll(len(anchors)))

    return run


def published(temperature: float, base_temperature: float | None = None) -> Peer:
    """The arithmetic of the reference code's SupConLoss, without labels; base temperature None: the temperature."""
    scale = 1.0 if base_temperature is None else temperature / base_temperature

    def run(anchors: Tensor, positives: Tensor) -> Tensor:
        views = torch.cat([F.normalize(anchors, dim=1), F.normalize(positives, dim=1)])
        n = len(anchors)
        logits = torch.matmul(views, views.T) / temperature
        logits = logits - logits.max(1, keepdim=True).values.detach()
        mask = torch.eye(n, device=views.device).repeat(2, 2)
        others = torch.ones_like(mask).fill_diagonal_(0)
        mask = mask * others
        log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
        return -scale * ((mask * log_prob).sum(1) / mask.sum(1)).mean()

    return run
