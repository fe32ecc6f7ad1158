"""Triton kernels of the fused InfoNCE: a program takes a block of rows over the columns, a tile at a time.

Logits are in units of log 2, so that an exponential is one multiply-add and one exp2. Where they are bounded (BOUNDED),
one shift `bound` serves all; otherwise each row keeps its largest product so far, and only differences of products are
scaled (a large scaled product is rounded by more than 1). lse is in units of products. Masks apply only to tiles at the
end of the columns, on the diagonal or with targets. Launchers: kernels/info_nce.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Gradient weights are at most 2, as the largest of g and h is scaled to 1; times GAIN they fill float16's range.
GAIN = tl.constexpr(2.0**14)
GAIN_LOG2 = tl.constexpr(14.0)

# Not compiled again for each batch size.
_kernel = triton.jit(do_not_specialize=("m", "k", "offset", "shift", "first", "last", "each", "count", "splits"))


@triton.jit
def _load(matrix, first, count, start, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `first` and columns from `start` of a contiguous [count, D]: [COUNT, WIDTH], zeros beyond."""
    i = tl.arange(0, COUNT)
    d = start + tl.arange(0, WIDTH)
    at = matrix + tl.cast(first, tl.int64) * D + (i[:, None] * D + d[None, :])
    exists = (i < count - first)[:, None]
    if D % WIDTH != 0:
        exists &= (d < D)[None, :]
    return tl.load(at, exists, 0.0)


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32."""
    if PRECISION == "interpreted":
        # The interpreter would multiply the bits of bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _products(
    own, rows, i0, m, columns, j0, k,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows_i . columns_j, [BLOCK_M, BLOCK_N]; `own` are the rows' first BLOCK_D columns."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if D <= BLOCK_D:
        other = _load(columns, j0, k, 0, D, BLOCK_N, BLOCK_D)
        products = _dot(own, tl.trans(other), products, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            own = _load(rows, i0, m, start, D, BLOCK_M, BLOCK_D)
            other = _load(columns, j0, k, start, D, BLOCK_N, BLOCK_D)
            products = _dot(own, tl.trans(other), products, PRECISION)
    return products


@triton.jit
def _target(i, m, offset, shift):
    """Column of the target of row i; -1 where rows have none."""
    i += shift
    return tl.where(shift < 0, -1, offset + tl.where(i >= m, i - m, i))


@triton.jit
def _store_losses(
    peak, total, rows, columns, i, scale, m, offset, shift, losses, lse, D: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Store lse and losses of rows `i` [BLOCK], whose exponentials, divided by that of `peak`, have the sum `total`.

    `peak` is a logit in units of log 2 where BOUNDED, otherwise a product.
    """
    exists = i < m
    logit = tl.zeros(i.shape, tl.float32)
    if shift >= 0:
        own = tl.where(exists, i, 0).to(tl.int64)
        other = tl.where(exists, _target(i, m, offset, shift), 0).to(tl.int64)
        for start in range(0, D, 16):
            d = start + tl.arange(0, 16)[None, :]
            inside = exists[:, None] & (d < D)
            x = tl.load(rows + own[:, None] * D + d, inside, 0.0).to(tl.float32)
            logit += tl.sum(x * tl.load(columns + other[:, None] * D + d, inside, 0.0).to(tl.float32), 1)
    rest = tl.log2(total)
    # The two large ones first: rounding their sum would show in small losses.
    if BOUNDED:
        tl.store(lse + i, (peak + rest) / scale, exists)
        tl.store(losses + i, (peak - scale * logit + rest) * LN_2, exists)
    else:
        tl.store(lse + i, peak + rest / scale, exists)
        tl.store(losses + i, (scale * (peak - logit) + rest) * LN_2, exists)


@_kernel
def losses_kernel(
    rows, columns, scale, bound, m, k, offset, shift, each, losses, lse, nearest, nearest_logit, parts, parts_at,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
):  # fmt: skip
    """Losses and lse of BLOCK_M rows [M, D] against all columns [K, D], and unless None `nearest` and its logit.

    With `parts` [2 or 3, splits, M] a program takes `each` of the columns and stores its maxima, sums and largest
    products there, and the columns of the latter in `parts_at` [splits, M], for merge_kernel.
    """
    begin = tl.program_id(1) * each
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    own = _load(rows, i0, m, 0, D, BLOCK_M, BLOCK_D)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite, so that a row without any logit so far has no inf - inf.
    peak = tl.full((BLOCK_M,), bound if BOUNDED else -3e38, tl.float32)
    if nearest is not None:
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        best_at = tl.zeros((BLOCK_M,), tl.int32)
    for j0 in range(begin, tl.minimum(begin + each, k), BLOCK_N):
        products = _products(own, rows, i0, m, columns, j0, k, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        j = j0 + tl.arange(0, BLOCK_N)
        special = j0 + BLOCK_N > k
        if EXCLUDE_SELF:
            special |= (j0 < offset + i0 + BLOCK_M) & (j0 + BLOCK_N > offset + i0)
        if special:
            keep = (j < k)[None, :]
            if EXCLUDE_SELF:
                keep &= j[None, :] != (offset + i)[:, None]
            products = tl.where(keep, products, float("-inf"))
        if nearest is not None:
            # NaN is never the largest. Later columns are only where they are larger.
            largest, at = tl.max(tl.where(products == products, products, float("-inf")), 1, return_indices=True)
            best_at = tl.where(largest > best, j0 + at, best_at)
            best = tl.where(largest > best, largest, best)
        if not BOUNDED:
            # A maximum may leave NaN out: its exponential is NaN all the same.
            higher = tl.maximum(peak, tl.max(products, 1))
            total *= tl.exp2(scale * (peak - higher))
            peak = higher
            total += tl.sum(tl.exp2(scale * (products - peak[:, None])), 1)
        else:
            total += tl.sum(tl.exp2(scale * products - bound), 1)
    if parts is not None:
        at = tl.program_id(1).to(tl.int64) * m + i
        half = tl.num_programs(1).to(tl.int64) * m
        tl.store(parts + at, peak, i < m)
        tl.store(parts + half + at, total, i < m)
        if nearest is not None:
            tl.store(parts + 2 * half + at, best, i < m)
            tl.store(parts_at + at, best_at, i < m)
        return
    _store_losses(peak, total, rows, columns, i, scale, m, offset, shift, losses, lse, D, BOUNDED)
    if nearest is not None:
        tl.store(nearest + i, best_at.to(tl.int64), i < m)
        tl.store(nearest_logit + i, scale * best * LN_2, i < m)


@_kernel
def merge_kernel(
    rows, columns, scale, m, offset, shift, splits, losses, lse, nearest, nearest_logit, parts, parts_at,
    D: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Merge the parts of losses_kernel into its results."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < m
    step = tl.cast(m, tl.int64)
    peak = tl.full((BLOCK,), -3e38, tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(parts + split * step + i, exists, 0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = tl.load(parts + (splits + split) * step + i, exists, 0.0)
        # Where BOUNDED all have the same one.
        total += part * tl.exp2(scale * (tl.load(parts + split * step + i, exists, 0.0) - peak))
    _store_losses(peak, total, rows, columns, i, scale, m, offset, shift, losses, lse, D, BOUNDED)
    if nearest is not None:
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_at = tl.zeros((BLOCK,), tl.int32)
        for split in range(splits):
            largest = tl.load(parts + (2 * splits + split) * step + i, exists, 0.0)
            best_at = tl.where(largest > best, tl.load(parts_at + split * step + i, exists, 0), best_at)
            best = tl.where(largest > best, largest, best)
        tl.store(nearest + i, best_at.to(tl.int64), exists)
        tl.store(nearest_logit + i, scale * best * LN_2, exists)


@triton.jit
def _mirrored(block, count):
    """Number of tiles of block `block` of `count`, which form a circle, up to the opposite block.

    Of an even number of blocks the opposite one is as far in both directions: blocks of the first half take it.
    """
    return (count + 1) // 2 + tl.where((count % 2 == 0) & (block < count // 2), 1, 0)


@_kernel
def triangle_kernel(
    rows, scale, bound, m, first, last, each, count, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials over tiles of a symmetric matrix, along both axes.

    Blocks of rows form a circle of `count`: the tiles of block b are b, b + 1, ... up to the opposite one. This launch
    takes those at distances `first` to `last` - 1, a program `each` of them. Its sums along rows go to
    parts[last - first + program_id(1)], those along columns to parts[distance - first]; parts is [parts, M].
    """
    block = tl.program_id(0)
    i0 = block * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    own = _load(rows, i0, m, 0, D, BLOCK, BLOCK_D)
    begin = first + tl.program_id(1) * each
    end = tl.minimum(tl.minimum(begin + each, last), _mirrored(block, count))
    total = tl.zeros((BLOCK,), tl.float32)
    for distance in range(begin, end):
        other = block + distance
        other = tl.where(other >= count, other - count, other)
        j0 = other * BLOCK
        j = j0 + tl.arange(0, BLOCK)
        products = _products(own, rows, i0, m, rows, j0, m, D, BLOCK, BLOCK, BLOCK_D, PRECISION)
        if (distance == 0) | (j0 + BLOCK > m) | (i0 + BLOCK > m):
            keep = (i < m)[:, None] & (j < m)[None, :] & (i[:, None] != j[None, :])
            products = tl.where(keep, products, float("-inf"))
        exponentials = tl.exp2(scale * products - bound)
        total += tl.sum(exponentials, 1)
        if distance > 0:
            tl.store(parts + (distance - first).to(tl.int64) * m + j, tl.sum(exponentials, 0), j < m)
    tl.store(parts + (last - first + tl.program_id(1)).to(tl.int64) * m + i, total, i < m)


@_kernel
def finish_kernel(
    rows, scale, bound, m, shift, first, last, each, count, parts, losses, lse,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the parts of triangle_kernel to those of former launches, kept in lse; the last launch makes the losses."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    exists = i < m
    total = tl.zeros((BLOCK,), tl.float32)
    if first > 0:
        total += tl.load(lse + i, exists, 0.0)
    # Blocks nearer to this one in the other direction.
    opposite = count - count // 2
    nearer = tl.where((count % 2 == 0) & (block < opposite), opposite, count // 2 + 1)
    for distance in range(tl.maximum(first, 1), tl.minimum(last, nearer)):
        total += tl.load(parts + (distance - first).to(tl.int64) * m + i, exists, 0.0)
    for part in range(last - first, last - first + (last - first + each - 1) // each):
        total += tl.load(parts + tl.cast(part, tl.int64) * m + i, exists, 0.0)
    if last == count // 2 + 1:
        _store_losses(bound, total, rows, rows, i, scale, m, 0, shift, losses, lse, D, True)
    else:
        tl.store(lse + i, total, exists)


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
def _share(products, scale, lse):
    """Shares of a sum, at most 1 (also where a large product is rounded otherwise than lse was), times GAIN."""
    logit = scale * (products - lse)
    return tl.exp2(tl.where(logit > 0, 0.0, logit) + GAIN_LOG2)  # keeps NaN


@_kernel
def gradients_kernel(
    rows, columns, scale, bound, m, k, row_lse, row_grad, column_lse, column_grad, offset, shift, grad_rows, each,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BOUNDED: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of the gradient of BLOCK_M rows, over `each` of the columns [K, D].

    grad_rows is [M, D], or [splits, M, D] where the columns are split.
    """
    i0 = tl.program_id(0) * BLOCK_M
    out0 = tl.program_id(1) * WIDTH
    begin = tl.program_id(2) * each
    i = i0 + tl.arange(0, BLOCK_M)
    own = _load(rows, i0, m, 0, D, BLOCK_M, BLOCK_D)
    target = _target(i, m, offset, shift)
    first_target = i0 + shift
    unit = 1.2e-38
    if row_grad is not None:
        unit = tl.maximum(unit, _largest(row_grad, m))
    if column_grad is not None:
        unit = tl.maximum(unit, _largest(column_grad, k))
    if row_grad is not None:
        g = tl.load(row_grad + i, i < m, 0.0) * (1 / unit)
        row_level = tl.load(row_lse + i, i < m, 0.0)
        if BOUNDED:
            row_factor = g * tl.exp2(bound - scale * row_level)
    gradient = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for j0 in range(begin, tl.minimum(begin + each, k), BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            other = _load(columns, j0, k, 0, D, BLOCK_N, BLOCK_D)
            products = _dot(own, tl.trans(other), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            products = _products(own, rows, i0, m, columns, j0, k, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
            other = _load(columns, j0, k, out0, D, BLOCK_N, WIDTH)
        if column_grad is not None:
            h = tl.load(column_grad + j, j < k, 0.0) * (1 / unit)
            column_level = tl.load(column_lse + j, j < k, 0.0)
        # One exponential times the sum of both factors, where the factors are sure to be in range.
        if BOUNDED:
            weights = tl.exp2(scale * products - (bound - GAIN_LOG2))
            if column_grad is None:
                weights *= row_factor[:, None]
            elif row_grad is None:
                weights *= (h * tl.exp2(bound - scale * column_level))[None, :]
            else:
                weights *= row_factor[:, None] + (h * tl.exp2(bound - scale * column_level))[None, :]
        elif column_grad is None:
            weights = g[:, None] * _share(products, scale, row_level[:, None])
        else:
            weights = h[None, :] * _share(products, scale, column_level[None, :])
            if row_grad is not None:
                weights += g[:, None] * _share(products, scale, row_level[:, None])
        special = j0 + BLOCK_N > k
        if EXCLUDE_SELF:
            special |= (j0 < offset + i0 + BLOCK_M) & (j0 + BLOCK_N > offset + i0)
        if shift >= 0:
            # Targets are neighbours, but for a jump from the last row to the first.
            after = j0 - offset
            special |= (after < first_target + BLOCK_M) & (after + BLOCK_N > first_target)
            after += m
            special |= (after < first_target + BLOCK_M) & (after + BLOCK_N > first_target)
        if special:
            keep = (j < k)[None, :]
            if EXCLUDE_SELF:
                keep &= j[None, :] != (offset + i)[:, None]
            weights = tl.where(keep, weights, 0.0)
            # Before rounding to half precision: 1 - p may be small.
            is_target = j[None, :] == target[:, None]
            if row_grad is not None:
                weights -= tl.where(is_target, g[:, None] * GAIN, 0.0)
            if column_grad is not None:
                weights -= tl.where(is_target, h[None, :] * GAIN, 0.0)
        gradient = _dot(weights.to(other.dtype), other, gradient, PRECISION)
    d = out0 + tl.arange(0, WIDTH)
    at = (tl.program_id(2).to(tl.int64) * m + i0) * D + tl.arange(0, BLOCK_M)[:, None] * D + d[None, :]
    tl.store(grad_rows + at, gradient * (scale * LN_2 / GAIN) * unit, (i < m)[:, None] & (d < D)[None, :])
