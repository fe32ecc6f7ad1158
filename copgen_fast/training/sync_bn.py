"""Batch norm over all ranks, or over each one's rows as DataParallel has it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from copgen_fast.config import BatchNorm
from copgen_fast.ops.info_nce.group import Gather
from copgen_fast.runtime.distributed import Ranks


def convert_sync_bn(module: nn.Module, bn: BatchNorm, ranks: Ranks, device: torch.device) -> nn.Module:
    """`module` with the batch norms that `--bn` asks for, to be called instead; its state dict keeps its names.

    sync: statistics of all ranks' rows. per-rank: of each one's own; its running statistics are then rank 0's, as
    rank 0 writes the files (DataParallel, too, keeps its first replica's). With one process nothing changes.
    """
    if ranks.alone or bn == "per-rank":
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, ranks.group)
    for name, norm in [*module.named_modules()]:
        if isinstance(norm, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, GroupBatchNorm2d(norm, ranks.group))
    return module


class GroupBatchNorm2d(nn.BatchNorm2d):
    """What torch.nn.SyncBatchNorm computes, which has no CPU form, for ranks with equally many rows each.

    Gradients are those of the sum of all ranks' losses. Takes over the parameters and buffers of `norm`.
    """

    def __init__(self, norm: nn.BatchNorm2d, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.train(norm.training)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack([values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)])
        means, variances = Gather.apply(own[None], self.group).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        self._follow(mean.detach(), variance.detach(), len(means) * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalized = (values - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normalized.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
