"""Triton kernels of the fused InfoNCE's gradients; see similarity.py.

A tile's products are computed again, and their exponentials, times factors of the row and of the column, are the
weights of the columns' rows in the gradient.
"""

import triton
import triton.language as tl
from copgen_fast.kernels.similarity import LN_2, dot, kernel, load_rows, plain_until, products_of, target_of

# Weights are at most 2, as the largest gradient is scaled to 1; times GAIN they fill float16's range.
GAIN = tl.constexpr(2.0**14)
GAIN_LOG2 = tl.constexpr(14.0)


@triton.jit
def _largest(numbers, count):
    """Largest absolute value of `count` numbers, over 0."""
    # As float32, whose smallest normal number is the inverse of a number.
    largest = tl.full((1024,), 1.2e-38, tl.float32)
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.abs(tl.load(numbers + at, at < count, 0.0)))
    return tl.max(largest)


@triton.jit
def _unit(row_grad, column_grad, m, k):
    """The largest absolute gradient, over 0: weights are in units of it."""
    unit = tl.full((), 1.2e-38, tl.float32)
    if row_grad is not None:
        unit = tl.maximum(unit, _largest(row_grad, m))
    if column_grad is not None:
        unit = tl.maximum(unit, _largest(column_grad, k))
    return unit


@triton.jit
def _factor(lse, grad, at, count, scale, bound, unit, BOUNDED: tl.constexpr):
    """What the exponentials of a row or column are multiplied by, with GAIN and over their sum where BOUNDED."""
    factor = tl.load(grad + at, at < count, 0.0) * (1 / unit)
    if BOUNDED:
        factor *= GAIN * tl.exp2(bound - scale * tl.load(lse + at, at < count, 0.0))
    return factor


@kernel
def factors_kernel(
    scale, bound, m, k, row_lse, row_grad, column_lse, column_grad, row_factors, column_factors, unit,
    BLOCK: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Store the factors of rows and of columns, of what is given, and `unit` [1], for many programs to load."""
    largest = _unit(row_grad, column_grad, m, k)
    if tl.program_id(0) == 0:
        tl.store(unit, largest)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if row_factors is not None:
        tl.store(row_factors + at, _factor(row_lse, row_grad, at, m, scale, bound, largest, BOUNDED), at < m)
    if column_factors is not None:
        tl.store(column_factors + at, _factor(column_lse, column_grad, at, k, scale, bound, largest, BOUNDED), at < k)


@triton.jit
def _share(products, scale, lse):
    """Shares of a sum, at most 1 (also where a large product is rounded otherwise than lse was), times GAIN."""
    logit = scale * (products - lse)
    return tl.exp2(tl.where(logit > 0, 0.0, logit) + GAIN_LOG2)  # keeps NaN


@kernel
def gradients_kernel(
    rows, columns, scale, bound, m, k, row_lse, row_grad, column_lse, column_grad, row_factors, column_factors, unit,
    offset, shift, grad_rows, each,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BOUNDED: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of the gradient of BLOCK_M rows, over `each` of the columns [K, D].

    grad_rows is [M, D], or [splits, M, D] where the columns are split. `unit` and the factors are factors_kernel's;
    where they are None, as for few rows and columns, each program finds them itself.
    """
    i0 = tl.program_id(0) * BLOCK_M
    out0 = tl.program_id(1) * WIDTH
    begin = tl.program_id(2) * each
    i = i0 + tl.arange(0, BLOCK_M)
    end = tl.minimum(begin + each, k)
    own = load_rows(rows, i0, m, 0, D, BLOCK_M, BLOCK_D, True)
    largest = _unit(row_grad, column_grad, m, k) if unit is None else tl.load(unit)
    row_factor = tl.zeros((BLOCK_M,), tl.float32)
    row_level = tl.zeros((BLOCK_M,), tl.float32)
    if row_grad is not None:
        if row_factors is None:
            row_factor = _factor(row_lse, row_grad, i, m, scale, bound, largest, BOUNDED)
        else:
            row_factor = tl.load(row_factors + i, i < m, 0.0)
        if not BOUNDED:
            row_level = tl.load(row_lse + i, i < m, 0.0)
    gradient = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    NARROW: tl.constexpr = BLOCK_N if BLOCK_N <= 32 else BLOCK_N // 2
    j0 = begin
    while j0 < end:
        masked = plain_until(j0, begin, end, offset, i0, m, shift, BLOCK_M, BLOCK_N, EXCLUDE_SELF)
        for j in range(j0, masked, BLOCK_N):
            gradient = _add_gradient(
                gradient, own, row_factor, row_level, largest, rows, columns, i0, j, out0, scale, bound, m, k,
                row_grad, column_lse, column_grad, column_factors, offset, shift,
                D, BLOCK_M, BLOCK_N, BLOCK_D, WIDTH, PRECISION, BOUNDED, EXCLUDE_SELF, False,
            )  # fmt: skip
        # In halves, as masks take registers.
        for j in range(masked, tl.minimum(masked + BLOCK_N, end), NARROW):
            gradient = _add_gradient(
                gradient, own, row_factor, row_level, largest, rows, columns, i0, j, out0, scale, bound, m, k,
                row_grad, column_lse, column_grad, column_factors, offset, shift,
                D, BLOCK_M, NARROW, BLOCK_D, WIDTH, PRECISION, BOUNDED, EXCLUDE_SELF, True,
            )  # fmt: skip
        j0 = masked + BLOCK_N
    d = out0 + tl.arange(0, WIDTH)
    at = (tl.program_id(2).to(tl.int64) * m + i0) * D + tl.arange(0, BLOCK_M)[:, None] * D + d[None, :]
    tl.store(grad_rows + at, gradient * (scale * LN_2 / GAIN) * largest, (i < m)[:, None] & (d < D)[None, :])


@triton.jit
def _add_gradient(
    gradient, own, row_factor, row_level, largest, rows, columns, i0, j0, out0, scale, bound, m, k,
    row_grad, column_lse, column_grad, column_factors, offset, shift,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BOUNDED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the columns from `j0` on, times their weights, to gradients_kernel's `gradient`."""
    j = j0 + tl.arange(0, BLOCK_N)
    exists = (j < k) if MASKED else None
    other = load_rows(columns, j0, k, out0, D, BLOCK_N, WIDTH if D > BLOCK_D else BLOCK_D, MASKED)
    products = products_of(own, rows, i0, m, other, columns, j0, k, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    if column_grad is not None:
        if column_factors is None:
            column_factor = _factor(column_lse, column_grad, j, k, scale, bound, largest, BOUNDED)
        else:
            column_factor = tl.load(column_factors + j, exists)
    # One exponential times the sum of both factors, where the factors are sure to be in range.
    if BOUNDED:
        weights = tl.exp2(scale * products - bound)
        if column_grad is None:
            weights *= row_factor[:, None]
        elif row_grad is None:
            weights *= column_factor[None, :]
        else:
            weights *= row_factor[:, None] + column_factor[None, :]
    elif column_grad is None:
        weights = row_factor[:, None] * _share(products, scale, row_level[:, None])
    else:
        column_level = tl.load(column_lse + j, exists)
        weights = column_factor[None, :] * _share(products, scale, column_level[None, :])
        if row_grad is not None:
            weights += row_factor[:, None] * _share(products, scale, row_level[:, None])
    if MASKED:
        i = i0 + tl.arange(0, BLOCK_M)
        keep = exists[None, :]
        if EXCLUDE_SELF:
            keep &= j[None, :] != (offset + i)[:, None]
        weights = tl.where(keep, weights, 0.0)
        # Before rounding to half precision: 1 - p may be small.
        is_target = j[None, :] == target_of(i, m, offset, shift)[:, None]
        if row_grad is not None:
            g = tl.load(row_grad + i, i < m, 0.0) * (1 / largest) * GAIN
            weights -= tl.where(is_target, g[:, None], 0.0)
        if column_grad is not None:
            h = tl.load(column_grad + j, exists, 0.0) * (1 / largest) * GAIN
            weights -= tl.where(is_target, h[None, :], 0.0)
    return dot(weights.to(other.dtype), other, gradient, PRECISION)
