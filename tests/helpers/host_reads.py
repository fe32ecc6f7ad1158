"""Counts looks at a tensor's values from Python, each of which would make the host wait for a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class HostReads(TorchDispatchMode):
    """`with HostReads() as reads: ...; reads.count`: .item(), bool(tensor), and operators whose result's size is data.

    Looks inside an operator of C++ are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in _READS
        return func(*args, **(kwargs or {}))
