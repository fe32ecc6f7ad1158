"""Objectives on embeddings of a joint batch of views, anchors first."""

from __future__ import annotations

from torch import Tensor

from copgen_fast.checks import expect_tensor
from copgen_fast.ops import info_nce


def nt_xent(embeddings: Tensor, temperature: float, base_temperature: float | None) -> Tensor:
    """Symmetric NT-Xent of embeddings [2N, D] whose rows i and N + i are views of one instance; a scalar.

    Raises:
        TypeError, ValueError: no floating-point matrix, or an odd number of rows.
    """
    expect_tensor("embeddings", embeddings, ("2N", "D"))
    if len(embeddings) % 2:
        raise ValueError(f"embeddings: expected anchors and as many positives, got {len(embeddings)} rows")
    anchors, positives = embeddings.float().chunk(2)
    return info_nce(anchors, positives, temperature=temperature, base_temperature=base_temperature)
