"""InfoNCE in plain PyTorch: the definition that faster backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(anchors: Tensor, positives: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """Mean InfoNCE loss of checked inputs [N, D], in at least float32; see `copgen_fast.ops.info_nce`."""
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, positives.dtype), torch.float32)
    # Autocast would run the similarities in half precision, which a temperature of 0.01 magnifies 100 times.
    with torch.autocast(anchors.device.type, enabled=False):
        a = F.normalize(anchors.to(dtype), dim=1)
        p = F.normalize(positives.to(dtype), dim=1)
        if not symmetric:
            target = torch.arange(len(a), device=a.device)
            return F.cross_entropy(a @ p.T / temperature, target)
        views = torch.cat([a, p])
        self_pairs = torch.eye(len(views), dtype=torch.bool, device=a.device)
        logits = (views @ views.T / temperature).masked_fill(self_pairs, -torch.inf)
        # The other view of row i is row i + N, counted round the 2N rows.
        target = torch.arange(len(views), device=a.device).roll(len(a))
        return F.cross_entropy(logits, target)
