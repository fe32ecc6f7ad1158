"""How much a batch's embeddings vary: the sign of collapse."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.methods._heads import full


@torch.no_grad()
def embedding_std(embeddings: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Standard deviation of normalised embeddings [N, D] over the rows of all ranks, mean over dimensions, times
    sqrt(D): about 1 for directions drawn uniformly, 0 where all are the same.
    """
    unit = F.normalize(full(embeddings), dim=1)
    moments = torch.stack([unit.mean(0), unit.square().mean(0)])
    if group is not None:
        dist.all_reduce(moments, group=group)
        moments /= dist.get_world_size(group)
    mean, square = moments
    return (square - mean.square()).clamp_min(0).sqrt().mean() * unit.shape[1] ** 0.5
