"""Gradients averaged over the ranks while the backward still runs.

Not DistributedDataParallel: that regroups parameters after its first backward, so a run that was killed and started
again would add in another order and end in other bits. Here the groups are fixed. Without a wrapper around the
module, freezing it for the other player's update and compiling it stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.profiler import record_function

from copgen_fast.runtime.distributed import Ranks

BUCKET_BYTES = 25 * 2**20


class GradientSync:
    """The mean over ranks of the gradients of some parameters; with one process, nothing.

    With `ops.info_nce(group=...)` and synchronised batch norm, whose gradients are those of the sum of all ranks'
    losses, it is the gradient of the whole batch's mean loss: sum over ranks / number of ranks.

    Buckets of gradients are sent as they fill; when `backward` returns, the means are in place. On a GPU the host
    waits for none of it.

    Args:
        parameters: of one dtype each, all of which a backward reaches or none, on every rank in the same order.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        self._buckets = _bucketed(list(parameters)) if not ranks.alone else []
        self._left = [len(bucket) for bucket in self._buckets]
        self._sent: dict[int, tuple[Tensor, dist.Work]] = {}
        self._under_way = False
        self._held = False
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, index))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards that add to each rank's own gradients; the next one without sends all of them."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _ready(self, index: int, parameter: nn.Parameter) -> None:
        if self._held:
            return
        if not self._under_way:
            self._under_way = True
            Variable._execution_engine.queue_callback(self._finish)  # as DistributedDataParallel does
        self._left[index] -= 1
        if self._left[index] == 0:
            flat = torch.cat([parameter.grad.flatten() for parameter in self._buckets[index]])
            self._sent[index] = flat, dist.all_reduce(flat, group=self._ranks.group, async_op=True)

    @record_function("gradients of all ranks")
    def _finish(self) -> None:
        self._under_way = False
        unreached = sum(self._left)
        self._left = [len(bucket) for bucket in self._buckets]
        if unreached:
            raise RuntimeError(f"{unreached} parameters got no gradient in this backward, others did")
        for index, bucket in enumerate(self._buckets):
            flat, work = self._sent.pop(index)
            work.wait()
            flat /= self._ranks.world
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad.copy_(part.view(parameter.shape))


def _bucketed(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Last ones first, as their gradients come; a new bucket where one is full or the dtype changes."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        if not buckets or size + parameter.nbytes > BUCKET_BYTES or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
