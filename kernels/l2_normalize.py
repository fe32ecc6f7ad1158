"""Triton kernels of L2 normalisation and its gradient: one launch each for anchors and positives."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from copgen_fast.kernels.launch import PLANS, Launch, on_device
from torch import Tensor

__all__ = ["l2_normalize", "l2_normalize_backward"]

# A program's numbers: several rows where these are short.
BLOCK = 1024
WARPS = 4
# As torch.nn.functional.normalize.
SMALLEST = tl.constexpr(1e-12)

_kernel = triton.jit(do_not_specialize=("n", "s0", "s1", "t0", "t1", "u0", "u1", "v0", "v1"))


@triton.jit
def _rows_of(n, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows of the 2 N as a column, their columns as a row, and masks of anchors and positives."""
    row = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    return row, d, (row < n) & (d < D), (row >= n) & (row < 2 * n) & (d < D)


@triton.jit
def _load_rows(anchors, s0, s1, positives, t0, t1, n, row, d, is_anchor, is_positive, COMPUTE: tl.constexpr):
    # One of the two masked loads reads nothing.
    anchor = tl.load(anchors + row * s0 + d * tl.cast(s1, tl.int64), is_anchor, 0.0).to(COMPUTE)
    positive = tl.load(positives + (row - n) * t0 + d * tl.cast(t1, tl.int64), is_positive, 0.0).to(COMPUTE)
    return tl.where(is_anchor, anchor, positive)


@_kernel
def l2_normalize_kernel(
    anchors, s0, s1, positives, t0, t1, n, units, norms,
    D: tl.constexpr, COMPUTE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """COUNT rows of units [2N, D] and norms [2N]."""
    row, d, is_anchor, is_positive = _rows_of(n, D, COUNT, WIDTH)
    x = _load_rows(anchors, s0, s1, positives, t0, t1, n, row, d, is_anchor, is_positive, COMPUTE)
    norm = (
        tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True))
        if COMPUTE == tl.float32
        else tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
    )
    # A comparison, as a maximum may drop NaN.
    tl.store(units + row * D + d, x / tl.where(norm < SMALLEST, SMALLEST, norm), is_anchor | is_positive)
    tl.store(norms + row, norm, row < 2 * n)


@_kernel
def l2_normalize_backward_kernel(
    grads, anchors, s0, s1, positives, t0, t1, n, norms, grad_anchors, u0, u1, grad_positives, v0, v1,
    D: tl.constexpr, COMPUTE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """COUNT rows of the gradients [N, D] of anchors and positives, from that of the units [2N, D]."""
    row, d, is_anchor, is_positive = _rows_of(n, D, COUNT, WIDTH)
    x = _load_rows(anchors, s0, s1, positives, t0, t1, n, row, d, is_anchor, is_positive, COMPUTE)
    grad = tl.load(grads + row * D + d, is_anchor | is_positive, 0.0).to(COMPUTE)
    norm = tl.load(norms + row, row < 2 * n, 1.0)
    short = norm <= SMALLEST
    norm = tl.where(short, 1.0, norm)
    unit = x / norm
    grad = (grad - unit * tl.sum(unit * grad, 1, keep_dims=True)) / norm
    grad = tl.where(short, 0.0, grad)
    tl.store(grad_anchors + row * u0 + d * tl.cast(u1, tl.int64), grad, is_anchor)
    tl.store(grad_positives + (row - n) * v0 + d * tl.cast(v1, tl.int64), grad, is_positive)


def l2_normalize(anchors: Tensor, positives: Tensor, units: Tensor, norms: Tensor) -> None:
    """Fill `units` [2N, D] with the rows of `anchors`, then `positives` [N, D], over their norms, `norms` [2N].

    The inputs may have any strides. Computed in the dtype of `norms`; units divide by 1e-12 at least.
    """
    launch = _launch(l2_normalize_kernel, anchors.shape, norms.dtype, anchors.dtype, positives.dtype, units.dtype)
    inputs = (anchors, *anchors.stride(), positives, *positives.stride(), len(anchors))
    with on_device(anchors):
        launch(*inputs, units, norms)


def l2_normalize_backward(
    grad: Tensor, anchors: Tensor, positives: Tensor, norms: Tensor, grad_anchors: Tensor, grad_positives: Tensor
) -> None:
    """Fill `grad_anchors` and `grad_positives` [N, D] from the gradient of the units, contiguous [2N, D].

    A row whose norm is at most 1e-12 gets no gradient.
    """
    dtypes = (anchors.dtype, positives.dtype, grad.dtype, grad_anchors.dtype)
    launch = _launch(l2_normalize_backward_kernel, anchors.shape, norms.dtype, *dtypes)
    inputs = (anchors, *anchors.stride(), positives, *positives.stride(), len(anchors), norms)
    outputs = (grad_anchors, *grad_anchors.stride(), grad_positives, *grad_positives.stride())
    with on_device(anchors):
        launch(grad, *inputs, *outputs)


@lru_cache(PLANS)
def _launch(kernel: Any, shape: tuple[int, int], computed: torch.dtype, *dtypes: torch.dtype) -> Launch:
    """The launch for rows of this shape, and tensors of these types."""
    n, d = shape
    width = triton.next_power_of_2(d)
    count = max(1, BLOCK // max(width, 32))
    compute = tl.float64 if computed == torch.float64 else tl.float32
    meta = {"D": d, "COMPUTE": compute, "COUNT": count, "WIDTH": width, "num_warps": WARPS}
    return Launch(kernel, (triton.cdiv(2 * n, count),), specialized=True, **meta)


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's, of both kernels: half rows of 128, or float32 of 2048, too."""
    for dtype, d in ((torch.float16, 128), (torch.float32, 2048)) if thorough else ((torch.bfloat16, 128),):
        rows, units = (torch.empty(n, d, dtype=dtype, device=device) for n in (112, 224))
        norms = torch.empty(224, device=device)
        name = f"{str(dtype).removeprefix('torch.')} D={d}"
        yield name, partial(l2_normalize, rows, rows, units, norms)
        yield f"{name} backward", partial(l2_normalize_backward, units.float(), rows, rows, norms, rows, rows)
