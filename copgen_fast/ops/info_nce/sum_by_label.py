"""Sums over the rows of each label, for supervised InfoNCE, as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.derivatives import differentiated_again
from copgen_fast.ops.library import operator, register_autograd


@operator("sum_by_label")
def sum_by_label(x: Tensor, labels: Tensor) -> Tensor:
    """For each row of floating [M, D] the sum of all rows with its label; labels are int64 [M].

    Deterministic, without synchronising with the device. Self-adjoint, so it is its own backward.
    """
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    index = torch.empty_like(order)
    index[order] = starts.cumsum(0) - 1  # which of the distinct labels a row has
    if x.device.type == "cpu":
        return torch.zeros_like(x).index_add_(0, index, x)[index]
    # index_add_ is not deterministic on a GPU. As many lengths as rows, most of them 0: the host needs no count.
    lengths = torch.zeros_like(index).scatter_add_(0, index, torch.ones_like(index))
    return torch.segment_reduce(x[order], "sum", lengths=lengths, unsafe=True)[index]


register_fake(sum_by_label, lambda x, labels: torch.empty_like(x, memory_format=torch.contiguous_format))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (labels,) = ctx.saved_tensors
    if differentiated_again(grad):
        return (labels[:, None] == labels).to(grad.dtype) @ grad, None
    return sum_by_label(grad, labels), None


register_autograd(sum_by_label, _vjp, _setup)
