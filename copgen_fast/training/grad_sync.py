"""Gradients averaged over the ranks while the backward still runs, by DistributedDataParallel.

DDP would regroup its buckets after the first backward, and a run that was killed and resumed would add in another order
and end in other bits: `find_unused_parameters` prevents that, and allows for frozen modules. Gradients are equal to the
bit to those of hooks of our own, at the same speed. PyTorch's warning that no parameter is unused is silenced.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from copgen_fast.runtime.distributed import Ranks


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel with the attributes and the state dict of its module."""

    warned = False

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if self.warned or not (torch.is_grad_enabled() and self.require_backward_grad_sync):
            return super().forward(*inputs, **options)
        # Only the first forward before an averaged backward warns. The warning is C++'s, printed past Python's filters,
        # unless it comes out of a function of torch's that calls back, as this one does.
        self.warned, outputs = True, []

        def call(x: float) -> float:
            outputs.append(super(DataParallel, self).forward(*inputs, **options))
            return x

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
            torch.zeros(1, device="cpu").apply_(call)
        return outputs[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.module.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.module.load_state_dict(*args, **options)


def data_parallel(module: nn.Module, ranks: Ranks) -> nn.Module:
    """`module`, to be called instead, whose gradients are the mean over ranks when `backward` returns.

    Ranks start with rank 0's weights and buffers. With `ops.info_nce(group=...)` and synchronised batch norm, whose
    gradients are those of the sum of all ranks' losses, the mean is the gradient of the whole batch's mean loss.
    Parameters must be used by `forward`, and be in their final dtype and on their device.
    """
    if ranks.alone:
        return module
    for tensor in module.state_dict().values():  # equal by their seeds, but for the rounding of different hosts
        dist.broadcast(tensor, 0, group=ranks.group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.14 has another name for broadcast_buffers
        return DataParallel(module, process_group=ranks.group, broadcast_buffers=False, find_unused_parameters=True)


def no_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    """Context of forwards and backwards that add to each rank's own gradients; the next one without averages all."""
    return module.no_sync() if isinstance(module, DataParallel) else contextlib.nullcontext()
