"""Launchers of the fused InfoNCE in Triton: row losses, and their gradients, without storing the similarity matrix.

    s_ij = (rows_i . columns_j) / temperature,  loss_i = log sum_j exp(s_ij) - s_{i, target(i)}

Forward and backward are one launch each for few rows and columns. Where the rows alone don't fill the GPU, many columns
are split, and a second launch adds up the parts, in one order; before a large backward another one makes factors. Of a
large symmetric matrix half is computed: the exponentials of a tile are summed along both axes, and a second launch adds
up those sums.

For sm_80 and newer: on older GPUs Triton uses no matrix instructions, which is slow.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from copgen_fast.kernels.launch import PLANS, Launch, current_device, on_device
from copgen_fast.kernels.similarity import LOG2_E, finish_kernel, losses_kernel, merge_kernel, triangle_kernel
from copgen_fast.kernels.similarity_gradients import factors_kernel, gradients_kernel
from torch import Tensor

__all__ = ["row_gradients", "row_losses"]

# exp(s - bound) stays a normal float32 for |s| <= bound, and exp(bound - s) times 2^14, with room for both to be off.
LARGEST_BOUND = 38


class Blocks(NamedTuple):
    """Sizes of a program's tiles, and how it is compiled."""

    m: int  # rows
    n: int  # columns
    d: int  # of a product's sum
    width: int  # of the gradient
    warps: int
    stages: int
    precision: str

    def meta(self, d: int) -> dict[str, int | str]:
        shared = {"D": d, "BLOCK_D": self.d, "PRECISION": self.precision}
        # Without the limit the assembler spills in bf16x6 rather than take all registers.
        limit = {"maxnreg": 255} if self.precision == "bf16x6" else {}
        return {**shared, "num_warps": self.warps, "num_stages": self.stages, **limit}


def row_losses(
    rows: Tensor,
    columns: Tensor | None,
    temperature: float,
    bound: float,
    offset: int,
    shift: int,
    exclude_self: bool,
    losses: Tensor,
    lse: Tensor,
    nearest: Tensor | None,
    nearest_logit: Tensor | None,
    *,
    triangle_from: int = 2048,
    split_from: int = 2048,
    scratch_bytes: int = 2**25,
) -> None:
    """Fill `losses` and `lse` [M], and `nearest` and `nearest_logit` [M] unless None; see ops/info_nce/operator.py.

    From `triangle_from` rows on half of a symmetric matrix is computed, from `split_from` on columns may be split, with
    up to `scratch_bytes` of temporary memory.
    """
    m, d = rows.shape
    scale, bounded = LOG2_E.value / temperature, bound <= LARGEST_BOUND
    limit = bound * LOG2_E.value if bounded else 0.0
    shift = shift % m if shift >= 0 else -1
    with on_device(rows):
        if columns is None and exclude_self and offset == 0 and bounded and nearest is None and m >= triangle_from:
            _triangle(rows, scale, limit, shift, losses, lse, scratch_bytes)
            return
        columns = rows if columns is None else columns
        k, outputs = len(columns), (losses, lse, nearest, nearest_logit)
        sizes, options = (m, k, d), (bounded, exclude_self, split_from, scratch_bytes)
        launch, merge, splits, each = _losses_of(rows.dtype, *sizes, *options, *_compiled_for(columns, *outputs))
        parts = parts_at = None
        if splits > 1:
            parts = losses.new_empty(2 if nearest is None else 3, splits, m)
            parts_at = None if nearest is None else nearest.new_empty(splits, m, dtype=torch.int32)
        launch(rows, columns, scale, limit, m, k, offset, shift, each, *outputs, parts, parts_at)
        if splits > 1:
            merge(rows, columns, scale, m, offset, shift, splits, *outputs, parts, parts_at)


@lru_cache(PLANS)
def _losses_of(
    dtype: torch.dtype,
    m: int,
    k: int,
    d: int,
    bounded: bool,
    exclude_self: bool,
    split_from: int,
    scratch_bytes: int,
    *_: Any,
) -> tuple[Launch, Launch, int, int]:
    """Launches of the losses, and of their merge if columns are split; the number of parts, and the columns of each."""
    blocks = _blocks(dtype, m, k, d, "losses")
    programs = triton.cdiv(m, blocks.m)
    splits, each = _split(k, programs, blocks, split_from, scratch_bytes // (16 * m))
    meta = {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n} | blocks.meta(d)
    meta |= {"BOUNDED": bounded, "EXCLUDE_SELF": exclude_self}
    losses = Launch(losses_kernel, (programs, splits), specialized=True, **meta)
    merge = Launch(merge_kernel, (triton.cdiv(m, 64),), specialized=True, D=d, BLOCK=64, BOUNDED=bounded)
    return losses, merge, splits, each


def _triangle(
    rows: Tensor, scale: float, limit: float, shift: int, losses: Tensor, lse: Tensor, scratch_bytes: int
) -> None:
    m, d = rows.shape
    bands, height = _triangle_of(rows.dtype, m, d, scratch_bytes, *_compiled_for(losses, lse))
    parts = lse.new_empty(height, m)
    for triangle, finish, sizes in bands:
        triangle(rows, scale, limit, m, *sizes, parts)
        finish(rows, scale, limit, m, shift, *sizes, parts, losses, lse)


@lru_cache(PLANS)
def _triangle_of(
    dtype: torch.dtype, m: int, d: int, scratch_bytes: int, *_: Any
) -> tuple[list[tuple[Launch, Launch, tuple[int, int, int, int]]], int]:
    """Both launches of each band of distances, with its `first`, `last`, `each` and `count`; the number of parts."""
    blocks = _blocks(dtype, m, m, d, "triangle")
    count = triton.cdiv(m, blocks.m)
    distances = count // 2 + 1
    # Some hundreds of programs, of few tiles each where there are few.
    each = min(16, triton.cdiv(count * distances, 512))
    band = max(1, min(distances, scratch_bytes // (4 * m) * each // (each + 1)))
    finish = Launch(finish_kernel, (count,), specialized=True, D=d, BLOCK=blocks.m)
    bands = []
    for first in range(0, distances, band):
        last = min(first + band, distances)
        grid = (count, triton.cdiv(last - first, each))
        meta = {"BLOCK": blocks.m, "STEP": blocks.n, **blocks.meta(d)}
        bands.append((Launch(triangle_kernel, grid, specialized=True, **meta), finish, (first, last, each, count)))
    return bands, band + triton.cdiv(band, each)


def row_gradients(
    rows: Tensor,
    columns: Tensor | None,
    temperature: float,
    bound: float,
    row_lse: Tensor | None,
    row_grad: Tensor | None,
    column_lse: Tensor | None,
    column_grad: Tensor | None,
    offset: int,
    shift: int,
    exclude_self: bool,
    grad_rows: Tensor,
    *,
    factors_from: int = 2048,
    split_from: int = 2048,
    scratch_bytes: int = 2**25,
) -> None:
    """Fill `grad_rows` [M, D]; see ops/info_nce/operator.py, and `row_losses` for other keywords.

    From `factors_from` rows or columns on a launch makes factors, which programs would else find themselves.
    """
    m, d = rows.shape
    symmetric = columns is None
    if symmetric:
        columns, column_lse, column_grad = rows, row_lse, row_grad
    k = len(columns)
    bounded = bound <= LARGEST_BOUND
    scale, limit = LOG2_E.value / temperature, bound * LOG2_E.value if bounded else 0.0
    shift = shift % m if shift >= 0 else -1
    statistics = (row_lse, row_grad, column_lse, column_grad)
    factors: tuple[Tensor | None, ...] = (None, None, None)
    with on_device(rows):
        sizes, options = (m, k, d), (bounded, exclude_self, factors_from, split_from, scratch_bytes)
        others = _compiled_for(columns, *statistics, grad_rows)
        make_factors, launch, splits, each = _gradients_of(rows.dtype, *sizes, *options, symmetric, *others)
        if make_factors is not None:
            given = row_grad, None if symmetric else column_grad
            of_rows, of_columns = (None if x is None else torch.empty_like(x) for x in given)
            unit = grad_rows.new_empty(1)
            make_factors(scale, limit, m, k, *statistics, of_rows, of_columns, unit)
            factors = (of_rows, of_rows if symmetric else of_columns, unit)
        parts = grad_rows.new_empty(splits, m, d) if splits > 1 else grad_rows
        launch(rows, columns, scale, limit, m, k, *statistics, *factors, offset, shift, parts, each)
        if splits > 1:
            torch.sum(parts, 0, out=grad_rows)


@lru_cache(PLANS)
def _gradients_of(
    dtype: torch.dtype,
    m: int,
    k: int,
    d: int,
    bounded: bool,
    exclude_self: bool,
    factors_from: int,
    split_from: int,
    scratch_bytes: int,
    *_: Any,
) -> tuple[Launch | None, Launch, int, int]:
    """Launches of the factors, from `factors_from` on, and of the gradients; number of parts, and columns of each."""
    factors = None
    if max(m, k) >= factors_from:
        of_factors = (triton.cdiv(max(m, k), 1024),)
        factors = Launch(factors_kernel, of_factors, specialized=True, BLOCK=1024, BOUNDED=bounded)
    blocks = _blocks(dtype, m, k, d, "gradients")
    grid = (triton.cdiv(m, blocks.m), triton.cdiv(d, blocks.width))
    splits, each = _split(k, grid[0] * grid[1], blocks, split_from, scratch_bytes // (4 * m * d))
    meta = {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "WIDTH": blocks.width} | blocks.meta(d)
    meta |= {"BOUNDED": bounded, "EXCLUDE_SELF": exclude_self}
    return factors, Launch(gradients_kernel, (*grid, splits), specialized=True, **meta), splits, each


def _compiled_for(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The current device, and tensors' dtypes: with sizes and options, all that a launch is compiled for."""
    return current_device(), *[None if x is None else x.dtype for x in tensors]


def _split(k: int, programs: int, blocks: Blocks, split_from: int, most: int) -> tuple[int, int]:
    """Number of parts, at most `most`, that `k` columns are split into, and the columns of each.

    Programs as high as 128 rows fill a multiprocessor, of which large GPUs have some 130.
    """
    tiles = triton.cdiv(k, blocks.n)
    wanted = 2**14 // blocks.m // programs if blocks.m > 16 else 256 // programs
    splits = max(1, min(wanted, most, triton.cdiv(tiles, 8))) if k >= split_from else 1
    each = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, each), each * blocks.n


def _blocks(dtype: torch.dtype, m: int, k: int, d: int, kind: str) -> Blocks:
    """Blocks of `m` rows of `d` numbers against `k` columns for "losses", "triangle" (n rows at a time) or "gradients".

    Chosen so that no registers spill and shared memory fits the 99 KB of sm_86 and sm_120; for sm_90 on an H100. Low
    blocks make many programs of few rows; high ones read columns less often.
    """
    gradients, triangle = kind == "gradients", kind == "triangle"
    narrow = _power(d, 128)
    if triton.knobs.runtime.interpret:
        arch, precision = 90, "interpreted"
    else:
        arch = triton.runtime.driver.active.get_current_target().arch
        # Six products of bfloat16 make one of float32, faster than fused multiply-adds.
        precision = "bf16x6" if dtype == torch.float32 else "ieee"
        if arch < 80:
            # Without matrix instructions both factors of a product go through registers.
            return Blocks(32, 16 if gradients else 32, 16, _power(d, 64), 4, 1, "ieee")
    # Its matrix instructions take both factors from shared memory, which leaves registers for larger blocks.
    hopper = arch == 90
    few = max(m, k) <= 2048
    if dtype == torch.float32:
        if triangle:
            # Or three of TF32, nearly as precise.
            return Blocks(64, 64, _power(d, 32), 0, 4, 2, "tf32x3" if hopper and precision == "bf16x6" else precision)
        if few:
            return Blocks(16, 32, _power(d, 32), narrow, 8 if gradients else 4, 2, precision)
        if hopper or not gradients:
            return Blocks(64, 32, _power(d, 32), narrow, 4, 2, precision)
        return Blocks(64, 32, 16, narrow, 8, 2, precision)
    if triangle:
        return Blocks(128, 64, narrow if d <= 128 else 64, 0, 4 if d <= 128 else 8, 3, precision)
    height = 16 if few else 64 if m <= 4096 else 128
    if d <= 128:
        if gradients and hopper and not few:
            return Blocks(64, 64 if m <= 8192 else 128, narrow, narrow, 4, 3 if m <= 8192 else 2, precision)
        high = height == 128
        return Blocks(height, 64, narrow, narrow, 8 if high else 4, 2 if high and gradients else 3, precision)
    if gradients:
        # Products are computed again for every WIDTH columns: as wide as the registers allow.
        return Blocks(min(height, 64), 32, 64, _power(d, 512), 8, 3, precision)
    return Blocks(height, 64, 64, 0, 8 if height == 128 else 4, 3, precision)


def _power(d: int, most: int) -> int:
    """Next power of two of `d`, within a tile's smallest side and `most`."""
    return min(max(16, triton.next_power_of_2(d)), most)


def examples(thorough: bool, device: str = "meta") -> Iterator[tuple[str, Callable[[], None]]]:
    """Named launches on meta tensors, or a device's: all kernels in both precisions, or a few."""
    many = torch.empty(16384, 128, dtype=torch.float16, device=device)  # larger blocks on sm_90
    numbers = torch.empty(len(many), device=device)
    given = (numbers, numbers, None, None, 0, 0, True, many.float())
    yield f"float16 M={len(many)} gradients", partial(row_gradients, many, None, 0.1, 10.0, *given)
    for dtype, m in ((torch.float16, 8192), (torch.float32, 8192 if thorough else 224)):
        rows = torch.empty(m, 128, dtype=dtype, device=device)
        numbers, nearest = torch.empty(m, device=device), torch.empty(m, dtype=torch.int64, device=device)
        name = f"{str(dtype).removeprefix('torch.')} M={m}"
        losses, statistics = (0, 0, True, numbers, numbers), (numbers, numbers, None, None)
        gradients = (*statistics, 0, 0, True, rows.float())
        yield name, partial(row_losses, rows, None, 0.1, 10.0, *losses, None, None)
        yield f"{name} gradients", partial(row_gradients, rows, None, 0.1, 10.0, *gradients)
        if thorough or m > 224:
            yield f"{name} unbounded nearest", partial(row_losses, rows, None, 0.01, 100.0, *losses, nearest, numbers)
        if thorough:
            yield f"{name} unbounded gradients", partial(row_gradients, rows, None, 0.01, 100.0, *gradients)
