"""Triton kernels of the fused InfoNCE's losses: a program takes a block of rows over the columns, a tile at a time.

Logits are in units of log 2, so that an exponential is one multiply-add and one exp2. Where they are bounded (BOUNDED),
one shift `bound` serves all; otherwise each row keeps its largest product so far, and only differences of products are
scaled (a large scaled product is rounded by more than 1). lse is in units of products. Masks apply only to tiles at the
end of the columns, on the diagonal or with targets, which have loops of their own: in a loop with the others the
compiler turns a branch around the masks into selects that every tile executes. Launchers: kernels/info_nce.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Not compiled again for each batch size.
kernel = triton.jit(do_not_specialize=("m", "k", "offset", "shift", "first", "last", "each", "count", "splits"))


@triton.jit
def load_rows(
    matrix, first, count, start, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """Rows from `first` and columns from `start` of a contiguous [count, D]: [COUNT, WIDTH], zeros beyond.

    Unless MASKED all these rows exist.
    """
    i = tl.arange(0, COUNT)
    d = start + tl.arange(0, WIDTH)
    at = matrix + tl.cast(first, tl.int64) * D + (i[:, None] * D + d[None, :])
    if MASKED:
        exists = (i < count - first)[:, None]
        if D % WIDTH != 0:
            exists &= (d < D)[None, :]
        return tl.load(at, exists, 0.0)
    if D % WIDTH != 0:
        return tl.load(at, (d < D)[None, :], 0.0)
    return tl.load(at)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32."""
    if PRECISION == "interpreted":
        # The interpreter would multiply the bits of bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def products_of(
    own, rows, i0, m, other, columns, j0, k,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows_i . columns_j, [BLOCK_M, BLOCK_N]; `own` and `other` are all of them where D <= BLOCK_D."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if D <= BLOCK_D:
        products = dot(own, tl.trans(other), products, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            part = load_rows(rows, i0, m, start, D, BLOCK_M, BLOCK_D, True)
            other_part = load_rows(columns, j0, k, start, D, BLOCK_N, BLOCK_D, True)
            products = dot(part, tl.trans(other_part), products, PRECISION)
    return products


@triton.jit
def plain_until(
    j0, begin, end, offset, i0, m, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXCLUDE_SELF: tl.constexpr
):  # fmt: skip
    """Start of the first tile of columns from `j0` on that needs masks; `end` where there is none.

    It has columns beyond the end, or own columns or targets (`shift` < 0: there are none) of the rows from `i0` on.
    Tiles start at `begin`.
    """
    first = begin + (end - begin) // BLOCK_N * BLOCK_N  # unless the last tile is whole, which ends there
    if EXCLUDE_SELF:
        first = tl.minimum(first, _tile_of(j0, begin, end, offset + i0, BLOCK_M, BLOCK_N))
    if shift >= 0:
        # Targets are neighbours, but for a jump from the last row to the first.
        first = tl.minimum(first, _tile_of(j0, begin, end, offset + i0 + shift, BLOCK_M, BLOCK_N))
        first = tl.minimum(first, _tile_of(j0, begin, end, offset + i0 + shift - m, BLOCK_M, BLOCK_N))
    return first


@triton.jit
def _tile_of(j0, begin, end, low, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Start of the first tile from `j0` on with columns of low ... low + COUNT - 1; `end` where there is none."""
    first = begin + (tl.maximum(low, begin) - begin) // BLOCK_N * BLOCK_N
    return tl.where(low + COUNT > j0, tl.minimum(tl.maximum(first, j0), end), end)


@triton.jit
def target_of(i, m, offset, shift):
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
        other = tl.where(exists, target_of(i, m, offset, shift), 0).to(tl.int64)
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


@triton.jit
def _add_losses(
    peak, total, best, best_at, own, rows, columns, i0, j0, scale, bound, m, k, offset, nearest,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the columns from `j0` on to losses_kernel's peak, total, and unless `nearest` is None best and best_at."""
    other = load_rows(columns, j0, k, 0, D, BLOCK_N, BLOCK_D, MASKED)
    products = products_of(own, rows, i0, m, other, columns, j0, k, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    if MASKED:
        j = j0 + tl.arange(0, BLOCK_N)
        keep = (j < k)[None, :]
        if EXCLUDE_SELF:
            keep &= j[None, :] != (offset + i0 + tl.arange(0, BLOCK_M))[:, None]
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
    return peak, total, best, best_at


@kernel
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
    end = tl.minimum(begin + each, k)
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    own = load_rows(rows, i0, m, 0, D, BLOCK_M, BLOCK_D, True)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite, so that a row without any logit so far has no inf - inf.
    peak = tl.full((BLOCK_M,), bound if BOUNDED else -3e38, tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK_M,), tl.int32)
    j0 = begin
    while j0 < end:
        masked = plain_until(j0, begin, end, offset, i0, m, -1, BLOCK_M, BLOCK_N, EXCLUDE_SELF)
        for j in range(j0, masked, BLOCK_N):
            peak, total, best, best_at = _add_losses(
                peak, total, best, best_at, own, rows, columns, i0, j, scale, bound, m, k, offset, nearest,
                D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, BOUNDED, EXCLUDE_SELF, False,
            )  # fmt: skip
        if masked < end:
            peak, total, best, best_at = _add_losses(
                peak, total, best, best_at, own, rows, columns, i0, masked, scale, bound, m, k, offset, nearest,
                D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, BOUNDED, EXCLUDE_SELF, True,
            )  # fmt: skip
        j0 = masked + BLOCK_N
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


@kernel
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


@kernel
def triangle_kernel(
    rows, scale, bound, m, first, last, each, count, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials over tiles of a symmetric matrix, along both axes.

    Blocks of rows form a circle of `count`: the tiles of block b are b, b + 1, ... up to the opposite one. This launch
    takes those at distances `first` to `last` - 1, a program `each` of them. The sums for its own rows go to
    parts[last - first + program_id(1)], those for the other block's to parts[distance - first]; parts is [parts, M].

    The own rows are a tile's columns: threads add up many tiles' exponentials before they exchange any. The other rows
    pass by, STEP at a time; a warp holds some of them whole, so that their sums take few exchanges.
    """
    block = tl.program_id(0)
    i0 = block * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    own = load_rows(rows, i0, m, 0, D, BLOCK, BLOCK_D, True)
    begin = first + tl.program_id(1) * each
    end = tl.minimum(tl.minimum(begin + each, last), _mirrored(block, count))
    steps: tl.constexpr = BLOCK // STEP
    sums = tl.zeros((STEP, BLOCK), tl.float32)
    # Only a tile on the diagonal, and all of the last block where it is not whole, need masks.
    plain = tl.where(i0 + BLOCK > m, end, tl.minimum(tl.maximum(begin, 1), end))
    for step in range(begin * steps, plain * steps):
        sums = _pass_by(sums, own, rows, i0, step, scale, bound, m, first, count, parts, D, BLOCK, STEP, BLOCK_D,
                        PRECISION, True)  # fmt: skip
    for step in range(plain * steps, end * steps):
        sums = _pass_by(sums, own, rows, i0, step, scale, bound, m, first, count, parts, D, BLOCK, STEP, BLOCK_D,
                        PRECISION, False)  # fmt: skip
    tl.store(parts + (last - first + tl.program_id(1)).to(tl.int64) * m + i, tl.sum(sums, 0), i < m)


@triton.jit
def _pass_by(
    sums, own, rows, i0, step, scale, bound, m, first, count, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile's exponentials to triangle_kernel's `sums`, and store their sums for the rows that pass by."""
    steps: tl.constexpr = BLOCK // STEP
    distance = step // steps
    other = i0 // BLOCK + distance
    other = tl.where(other >= count, other - count, other)
    j0 = other * BLOCK + step % steps * STEP
    j = j0 + tl.arange(0, STEP)
    passing = load_rows(rows, j0, m, 0, D, STEP, BLOCK_D, True)
    products = products_of(passing, rows, j0, m, own, rows, i0, m, D, STEP, BLOCK, BLOCK_D, PRECISION)
    if MASKED:
        i = i0 + tl.arange(0, BLOCK)
        keep = (j < m)[:, None] & (i < m)[None, :] & (j[:, None] != i[None, :])
        products = tl.where(keep, products, float("-inf"))
    # Rows beyond the end, which are 0, have none.
    exponentials = tl.exp2(scale * products - tl.where(j < m, bound, float("inf"))[:, None])
    if not MASKED or distance > 0:
        tl.store(parts + (distance - first).to(tl.int64) * m + j, tl.sum(exponentials, 1), j < m)
    return sums + exponentials


@kernel
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
