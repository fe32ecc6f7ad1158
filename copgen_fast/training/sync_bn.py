"""Batch norm with the statistics of all ranks' rows (SyncBatchNorm on GPUs, the same on CPUs), or of each rank's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from copgen_fast.config import BatchNorm
from copgen_fast.ops.info_nce.group import Gather
from copgen_fast.runtime.distributed import Ranks


def convert_sync_bn(module: nn.Module, bn: BatchNorm, ranks: Ranks, device: torch.device) -> nn.Module:
    """`module` with its BatchNorm layers of any dimension as `--bn` says; its state dict keeps its names.

    sync: statistics of all ranks' rows. per-rank: of each rank's rows; the running statistics that are saved are then
    rank 0's, as DataParallel keeps its first replica's. With one process nothing changes.
    """
    if ranks.alone or bn == "per-rank":
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, ranks.group)
    return _converted(module, ranks.group)


def _converted(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return GroupBatchNorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, _converted(child, group))
    return module


class GroupBatchNorm(_BatchNorm):
    """torch.nn.SyncBatchNorm in plain operations, for CPUs and for ranks with equally many rows each.

    Gradients are those of the sum of all ranks' losses. Shares the parameters and buffers of `norm`.
    """

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.train(norm.training)
        self.group = group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        rows, channels = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        own = torch.stack([values.mean(rows), values.var(rows, correction=0)])
        means, variances = Gather.apply(own[None], self.group).unbind(1)
        count = len(means) * x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"expected more than one value per channel in training, got {list(x.shape)}")
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = self.weight * scale
        normalized = (values - mean.view(channels)) * scale.view(channels)
        if self.affine:
            normalized = normalized + self.bias.view(channels)
        return normalized.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)
