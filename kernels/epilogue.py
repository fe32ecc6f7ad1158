"""Triton kernels of the chunked InfoNCE: losses and weights from a chunk of products that cuBLAS computed.

Each chunk is read once. For GPUs, sizes and precisions without a fused kernel; see ops/info_nce/operator.py.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.launch import PLANS, Launch, on_device
from torch import Tensor

__all__ = ["losses_of", "weigh"]

BLOCK = 1024
WARPS = 4
# Below every product, and finite: differences with it are numbers.
LOWEST = tl.constexpr(-3e38)

_kernel = triton.jit(do_not_specialize=("k", "first", "m", "offset", "shift"))


@_kernel
def losses_of_kernel(
    products, scale, k, first, m, offset, shift, losses, lse, nearest, nearest_logit,
    EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a row of products; each lane keeps a maximum and a sum, merged at the end."""
    row = tl.program_id(0)
    start = products + row.to(tl.int64) * k
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.full((BLOCK,), 2147483647, tl.int32)
    for j0 in range(0, k, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        x = tl.load(start + j, j < k, float("-inf"))
        if EXCLUDE_SELF:
            x = tl.where(j == offset + first + row, float("-inf"), x)
        # A NaN is not larger, and makes the sum NaN.
        larger = x > maximum
        new = tl.where(larger, x, maximum)
        at = tl.where(larger, j, at)
        total = total * tl.exp(scale * (maximum - new)) + tl.exp(scale * (x - new))
        maximum = new
    peak = tl.max(maximum, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(scale * (maximum - peak)), 0))
    target = 0.0
    if shift >= 0:
        target = tl.load(start + offset + (first + row + shift) % m)
    # Only differences of products are scaled: a large scaled product is rounded by more than 1.
    tl.store(lse + row, peak + log_sum / scale)
    tl.store(losses + row, scale * (peak - target) + log_sum)
    if nearest is not None:
        # Where all is NaN nothing is nearest: any column will do.
        tl.store(nearest + row, tl.minimum(tl.min(tl.where(maximum == peak, at, 2147483647), 0), k - 1).to(tl.int64))
        tl.store(nearest_logit + row, scale * peak)


@triton.jit
def _share(products, scale, lse):
    """Shares of a sum: at most 1, also where a large product is rounded otherwise than lse was."""
    logit = scale * (products - lse)
    return tl.exp(tl.where(logit > 0, 0.0, logit))  # keeps NaN


@_kernel
def weigh_kernel(
    products, scale, k, first, m, offset, shift, row_lse, row_grad, column_lse, column_grad,
    EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace BLOCK products of a row by weights of the columns."""
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = j < k
    place = products + row.to(tl.int64) * k + j
    x = tl.load(place, exists, 0.0)
    weight = tl.zeros((BLOCK,), tl.float32)
    of_target = tl.zeros((BLOCK,), tl.float32)
    if row_lse is not None:
        grad = tl.load(row_grad + row)
        weight += grad * _share(x, scale, tl.load(row_lse + row))
        of_target += grad
    if column_lse is not None:
        grads = tl.load(column_grad + j, exists, 0.0)
        weight += grads * _share(x, scale, tl.load(column_lse + j, exists, 0.0))
        of_target += grads
    if EXCLUDE_SELF:
        weight = tl.where(j == offset + first + row, 0.0, weight)
    if shift >= 0:
        weight -= tl.where(j == offset + (first + row + shift) % m, of_target, 0.0)
    tl.store(place, weight, exists)


def losses_of(
    products: Tensor,
    temperature: float,
    first: int,
    m: int,
    offset: int,
    shift: int,
    exclude_self: bool,
    losses: Tensor,
    lse: Tensor,
    nearest: Tensor | None,
    nearest_logit: Tensor | None,
) -> None:
    """row_losses of rows `first` and on, of `m`, whose products [C, K] with the columns are given."""
    count, k = products.shape
    launch = _launch(losses_of_kernel, (count,), exclude_self, nearest is None)
    with on_device(products):
        launch(products, 1 / temperature, k, first, m, offset, shift, losses, lse, nearest, nearest_logit)


def weigh(
    products: Tensor,
    temperature: float,
    first: int,
    m: int,
    offset: int,
    shift: int,
    exclude_self: bool,
    row_lse: Tensor | None,
    row_grad: Tensor | None,
    column_lse: Tensor | None,
    column_grad: Tensor | None,
) -> None:
    """Replace products [C, K] by the weights of the columns in row_gradients, times the temperature."""
    count, k = products.shape
    grid = (count, -(-k // BLOCK))  # triton.cdiv takes 6 us on the host
    launch = _launch(weigh_kernel, grid, exclude_self, row_lse is None, column_lse is None)
    with on_device(products):
        launch(products, 1 / temperature, k, first, m, offset, shift, row_lse, row_grad, column_lse, column_grad)


@lru_cache(PLANS)
def _launch(kernel: Any, grid: tuple[int, ...], exclude_self: bool, *_: bool) -> Launch:
    """The launch on this grid, and for these arguments that are None."""
    return Launch(kernel, grid, specialized=True, EXCLUDE_SELF=exclude_self, BLOCK=BLOCK, num_warps=WARPS)


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's, that compile each kernel once, with all optional arguments."""
    products, of_rows, of_columns = (torch.empty(shape, device=device) for shape in ((64, 4096), 64, 4096))
    nearest = torch.empty(64, dtype=torch.int64, device=device)
    placed = (products, 0.1, 0, 4096, 0, 2048, True)
    yield "float32 nearest", partial(losses_of, *placed, of_rows, of_rows, nearest, of_rows)
    yield "float32 both", partial(weigh, *placed, of_rows, of_rows, of_columns, of_columns)
