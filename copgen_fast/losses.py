"""Objectives on embeddings of a joint batch of views, anchors first."""

from __future__ import annotations

from torch import Tensor

from copgen_fast.ops import info_nce


def nt_xent(embeddings: Tensor, temperature: float, base_temperature: float | None) -> Tensor:
    """Symmetric NT-Xent of embeddings [2N, D] whose rows i and N + i are views of one instance; a scalar."""
    anchors, positives = embeddings.float().chunk(2)
    return info_nce(anchors, positives, temperature=temperature, base_temperature=base_temperature)
