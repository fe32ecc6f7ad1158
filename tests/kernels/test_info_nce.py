"""The Triton kernels of InfoNCE and of L2 normalisation against float64.

The interpreter takes some 10 ms a tile, so matrices are small, and sizes, temperatures and dtypes take turns.
"""

import math
from typing import NamedTuple

import pytest
import torch
from copgen_fast.kernels.info_nce import row_gradients, row_losses
from copgen_fast.kernels.l2_normalize import l2_normalize, l2_normalize_backward

from copgen_fast.ops import info_nce
from tests.helpers.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A similarity matrix: m rows against k columns, which are the rows where None."""

    m: int
    k: int | None
    d: int
    temperature: float
    dtype: torch.dtype = FLOAT
    offset: int = 0
    shift: int = 0
    exclude_self: bool = False


def square(m, d, temperature, dtype=FLOAT):
    return Case(m, None, d, temperature, dtype, 0, m // 2, True)


SQUARE = [
    square(2, 3, 0.1, HALF),
    square(3, 64, 0.01),
    square(63, 300, 0.07, BFLOAT),
    square(64, 128, 0.1),
    square(65, 97, 0.01, HALF),
    square(97, 1, 1),
    square(130, 64, 0.07, HALF),
    square(200, 128, 0.01, BFLOAT),
]
RECTANGULAR = [
    Case(1, 1, 3, 0.1),
    Case(63, 63, 128, 0.07, HALF),
    Case(97, 97, 64, 0.01),
    Case(17, 20, 300, 0.07, FLOAT, 3, -1),
    # Ranks, whose rows are a slice of the columns.
    Case(64, 192, 97, 0.1, HALF, 64, 32, True),
    Case(33, 130, 300, 0.07, HALF, 97, 16, True),
    Case(66, 200, 64, 0.01, BFLOAT, 0, 33, True),
    Case(30, 100, 64, 0.1, BFLOAT, 70, 0, False),
    # Negatives alone.
    Case(3, 200, 64, 0.07, HALF, 0, -1, False),
    Case(65, 1, 1, 1, FLOAT, 0, -1, False),
]


def named(case):
    m, k, d, temperature, dtype, offset, shift, exclude_self = case
    self_excluded = " self" if exclude_self else ""
    return f"{m}x{k or m}x{d} t={temperature} {str(dtype)[6:]} {offset}{shift:+}{self_excluded}"


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=named)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def inputs(case):
    """Unit rows, and unit columns or None; a row's target lies near it."""
    rows = torch.nn.functional.normalize(random(case.m, case.d), dim=1)
    if case.k is None:
        return rows.to(case.dtype), None
    columns = torch.nn.functional.normalize(random(case.k, case.d, seed=1), dim=1)
    if case.offset + case.m <= case.k:
        columns[case.offset : case.offset + case.m] = torch.nn.functional.normalize(
            rows + 0.3 * columns[case.offset : case.offset + case.m], dim=1
        )
    return rows.to(case.dtype), columns.to(case.dtype)


def matrix(case, rows, columns):
    """s in the dtype of `rows`, which of it is summed, and which are targets; all [M, K]."""
    columns = rows if columns is None else columns
    s = rows @ columns.T / case.temperature
    i, j = torch.arange(len(rows), device=DEVICE)[:, None], torch.arange(len(columns), device=DEVICE)
    summed = (j != case.offset + i) if case.exclude_self else torch.ones_like(s, dtype=torch.bool)
    return s, summed, (j == case.offset + (i + case.shift) % case.m) & (case.shift >= 0)


def plain_losses(case, rows, columns):
    s, summed, target = matrix(case, rows, columns)
    s = s.to(torch.promote_types(s.dtype, FLOAT))
    lse = s.masked_fill(~summed, -math.inf).logsumexp(1)
    return lse - s.masked_fill(~target, 0).sum(1), lse


def plain_gradients(case, rows, columns, row, column):
    """`row` and `column` are (lse, grad) or None."""
    s, summed, target = matrix(case, rows, columns)
    weights = torch.zeros_like(s)
    for statistics, shape in ((row, (-1, 1)), (column, (1, -1))):
        if statistics is not None:
            lse, grad = (x.to(s.dtype).reshape(shape) for x in statistics)
            weights += grad * (torch.where(summed, (s - lse).exp(), 0) - target.to(s.dtype))
    return weights @ (rows if columns is None else columns) / case.temperature


def fused_losses(case, rows, columns, bound=None, nearest=False, **options):
    """losses and lse, and with `nearest` also nearest and nearest_logit."""
    out = [torch.full((case.m,), -7.0, device=DEVICE) for _ in range(2)]
    best = [torch.full((case.m,), -7, device=DEVICE), torch.empty(case.m, device=DEVICE)] if nearest else [None, None]
    bound = 1 / case.temperature if bound is None else bound
    row_losses(
        rows, columns, case.temperature, bound, case.offset, case.shift, case.exclude_self, *out, *best, **options
    )
    return out + best if nearest else out


def fused_gradients(case, rows, columns, row, column, bound=None, **options):
    grad = torch.full((case.m, case.d), -7.0, device=DEVICE)
    bound = 1 / case.temperature if bound is None else bound
    statistics = (*(row or (None, None)), *(column or (None, None)))
    row_gradients(
        rows, columns, case.temperature, bound, *statistics, case.offset, case.shift, case.exclude_self, grad, **options
    )
    return grad


def slack(case):
    """Rounding of the largest logit, of its multiple in units of log 2 and of the sum of both: 4 units of 2^-24."""
    return 2**-22 * (1 + 1 / case.temperature)


def assert_losses(case, rows, columns, got, slack):
    """At most twice as wrong as PyTorch in the same dtype."""
    want = plain_losses(case, rows.double(), None if columns is None else columns.double())
    theirs = plain_losses(case, rows, columns)
    for ours, other, exact in zip(got, theirs, want, strict=True):
        allowed = 2 * (other.double() - exact).abs().max() + slack
        assert (ours.double() - exact).abs().max() <= allowed


def assert_gradients(case, rows, columns, row, column, got, slack):
    double = [None if x is None else x.double() for x in (rows, columns)]
    pairs = (row, column if columns is not None else row)
    # A weight is a difference of p and 1, and p as wrong as its logit.
    slack *= sum(grad.norm() for _, grad in filter(None, pairs)) / case.temperature
    want = plain_gradients(case, *double, *pairs)
    if case.dtype == FLOAT:
        allowed = 2 * (plain_gradients(case, rows, columns, *pairs).double() - want).norm() + slack
    else:
        # PyTorch's exponentials would be half precision's, too. One rounding of weights, twice as much for two terms;
        # the interpreter cuts bfloat16 where a GPU rounds.
        allowed = (2**-9 if case.dtype == HALF else 2**-6) * want.norm() + slack
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= allowed


def statistics_of(case, rows, columns, by_column=False):
    """(lse, grad) as a caller has them; those of the columns as of matrix.T."""
    s, summed, _ = matrix(case, rows.double(), None if columns is None else columns.double())
    axis = 0 if by_column else 1
    lse = s.masked_fill(~summed, -math.inf).logsumexp(axis)
    return lse.float(), random(len(lse), seed=2 + axis).float()


# Losses.


@each(SQUARE + RECTANGULAR)
def test_losses(case):
    rows, columns = inputs(case)
    assert_losses(case, rows, columns, fused_losses(case, rows, columns), slack(case))


@each([SQUARE[3], SQUARE[4], RECTANGULAR[3]])
def test_losses_without_a_bound(case):
    rows, columns = inputs(case)
    assert_losses(case, rows, columns, fused_losses(case, rows, columns, math.inf), slack(case))


@each([square(2, 64, 0.1), square(65, 64, 0.07), square(130, 97, 0.1, HALF), square(200, 3, 0.07, BFLOAT)])
@pytest.mark.parametrize("scratch_bytes", [2**25, 1], ids=["one band", "bands"])
def test_losses_by_triangles(case, scratch_bytes):
    rows, _ = inputs(case)
    got = fused_losses(case, rows, None, triangle_from=1, scratch_bytes=scratch_bytes)
    assert_losses(case, rows, None, got, slack(case))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_triangles_with_every_number_of_blocks(count):
    # An even number of blocks has opposite ones. Blocks of float32 have 64 rows.
    case = square(64 * count - 7, 3, 0.1)
    rows, _ = inputs(case)
    for scratch_bytes in (2**25, 4 * case.m * 4):
        got = fused_losses(case, rows, None, triangle_from=1, scratch_bytes=scratch_bytes)
        assert_losses(case, rows, None, got, slack(case))


@pytest.mark.parametrize("bound", [10, math.inf])
def test_losses_of_split_columns(bound):
    case = Case(20, 700, 64, 0.1, HALF, 600, 10, True)
    rows, columns = inputs(case)
    got = fused_losses(case, rows, columns, bound, True, split_from=1)
    assert_losses(case, rows, columns, got[:2], slack(case))
    assert_nearest(case, rows, columns, got[2:])


def test_logits_that_are_all_very_negative():
    case = Case(20, 40, 16, 0.5, FLOAT, 0, 0, False)
    rows = random(20, 16).abs() + 2
    columns = -(random(40, 16, seed=1).abs() + 2)
    got = fused_losses(case, rows.float(), columns.float(), math.inf)
    assert got[1].max() < -100
    assert_losses(case, rows.float(), columns.float(), got, 2**-22 * 1000)
    row = statistics_of(case, rows.float(), columns.float())
    gradients = fused_gradients(case, rows.float(), columns.float(), row, None, math.inf)
    assert_gradients(case, rows.float(), columns.float(), row, None, gradients, 2**-22 * 1000)


@pytest.mark.parametrize("bound", [10, math.inf])
def test_nan_reaches_the_losses_it_touches(bound):
    case = Case(40, 70, 16, 0.1)
    rows, columns = inputs(case)
    rows[3, 2] = math.nan
    losses, lse, nearest, _ = fused_losses(case, rows, columns, bound, True)
    assert losses.isnan().nonzero().flatten().tolist() == lse.isnan().nonzero().flatten().tolist() == [3]
    assert ((nearest >= 0) & (nearest < 70)).all()
    rows, columns = inputs(case)
    columns[69] = math.nan
    assert fused_losses(case, rows, columns, bound)[0].isnan().all()
    rows, _ = inputs(square(130, 16, 0.1))
    rows[100] = math.nan
    assert fused_losses(square(130, 16, 0.1), rows, None, triangle_from=1)[0].isnan().all()


def assert_nearest(case, rows, columns, got):
    s, summed, _ = matrix(case, rows.double(), None if columns is None else columns.double())
    logit, nearest = s.masked_fill(~summed, -math.inf).max(1)
    assert torch.equal(got[0], nearest)
    torch.testing.assert_close(got[1].double(), logit, rtol=1e-6, atol=1e-6)


@each([SQUARE[3], SQUARE[4], RECTANGULAR[3], RECTANGULAR[7]])
def test_nearest(case):
    rows, columns = inputs(case)
    assert_nearest(case, rows, columns, fused_losses(case, rows, columns, None, True)[2:])


@pytest.mark.parametrize("split_from", [1, 10**6])
def test_of_ties_the_first_is_top(split_from):
    case = Case(5, 600, 4, 0.1, HALF)
    rows, columns = torch.ones(5, 4, device=DEVICE).half(), torch.zeros(600, 4, device=DEVICE).half()
    columns[[7, 40, 500]] = 1
    assert fused_losses(case, rows, columns, math.inf, True, split_from=split_from)[2].tolist() == [7] * 5
    columns[:] = -1
    assert fused_losses(case, rows, columns, math.inf, True, split_from=split_from)[2].tolist() == [0] * 5


# Gradients.


@each(SQUARE)
def test_gradients_of_square_ones(case):
    rows, _ = inputs(case)
    row = statistics_of(case, rows, None)
    got = fused_gradients(case, rows, None, row, None)
    assert_gradients(case, rows, None, row, None, got, slack(case))


@each(RECTANGULAR)
def test_gradients_of_rectangular_ones(case):
    rows, columns = inputs(case)
    row, column = (statistics_of(case, rows, columns, by_column) for by_column in (False, True))
    for pair in ((row, None), (None, column), (row, column)):
        assert_gradients(case, rows, columns, *pair, fused_gradients(case, rows, columns, *pair), slack(case))


def test_gradients_without_a_bound():
    case = square(40, 16, 0.1, HALF)
    rows, _ = inputs(case)
    row = statistics_of(case, rows, None)
    got = fused_gradients(case, rows, None, row, None, math.inf)
    assert_gradients(case, rows, None, row, None, got, slack(case))


def test_gradients_of_split_columns():
    case = Case(20, 700, 64, 0.1, HALF, 600, 10, True)
    rows, columns = inputs(case)
    row = statistics_of(case, rows, columns)
    got = fused_gradients(case, rows, columns, row, None, split_from=1)
    assert_gradients(case, rows, columns, row, None, got, slack(case))


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("bound", [10, math.inf])
def test_gradients_of_any_size(dtype, bound):
    case = square(34, 16, 0.1, dtype)
    rows, _ = inputs(case)
    lse, grad = statistics_of(case, rows, None)
    one = fused_gradients(case, rows, None, (lse, grad), None, bound)
    for factor in (1e-30, 1e30, -1):
        scaled = fused_gradients(case, rows, None, (lse, factor * grad), None, bound)
        torch.testing.assert_close(
            scaled.double() / factor, one.double(), rtol=1e-4, atol=1e-5 * one.abs().max().item()
        )
    assert not fused_gradients(case, rows, None, (lse, 0 * grad), None, bound).any()


def test_small_losses_have_precise_gradients():
    # All rows at their targets, which have nearly all the weight: 1 - p is what is left, and is not rounded from 1.
    case = Case(16, 16, 16, 0.1, BFLOAT)
    rows = torch.eye(16, device=DEVICE).bfloat16()
    row = statistics_of(case, rows, rows)
    got = fused_gradients(case, rows, rows, row, None)
    assert_gradients(case, rows, rows, row, None, got, slack(case))


def test_two_runs_are_bit_equal():
    case = square(100, 16, 0.1, HALF)
    rows, _ = inputs(case)
    row = statistics_of(case, rows, None)
    for run in (
        lambda: fused_losses(case, rows, None, triangle_from=1)[0],
        lambda: fused_gradients(case, rows, None, row, None, split_from=1),
    ):
        assert torch.equal(run(), run())


# Unit rows.


def arranged(x, how):
    """The numbers of `x` with other strides."""
    if how == "rows":
        return x.repeat_interleave(2, 0)[::2]
    return x.T.contiguous().T if how == "columns" else x


@pytest.mark.parametrize(
    ("n", "d", "dtype", "unit_dtype", "how"),
    [
        (1, 1, FLOAT, FLOAT, ""),
        (5, 3, HALF, HALF, "rows"),
        (3, 97, BFLOAT, FLOAT, "columns"),
        (17, 128, FLOAT, HALF, "rows"),
        (2, 2048, FLOAT, BFLOAT, ""),
        (4, 300, torch.float64, FLOAT, "columns"),
    ],
)
def test_l2_normalize(n, d, dtype, unit_dtype, how):
    anchors, positives = (arranged((5 * random(n, d, seed=seed)).to(dtype), how) for seed in (0, 1))
    units, norms = torch.empty(2 * n, d, dtype=unit_dtype, device=DEVICE), torch.empty(2 * n, device=DEVICE)
    l2_normalize(anchors, positives, units, norms)
    x = torch.cat([anchors, positives]).double().requires_grad_()
    want = torch.nn.functional.normalize(x, dim=1)
    # The interpreter cuts bfloat16 where a GPU rounds.
    rounding = {FLOAT: 2**-22, HALF: 2**-11, BFLOAT: 2**-7}[unit_dtype]
    torch.testing.assert_close(units.double(), want.detach(), rtol=1.01 * rounding, atol=2**-24)
    torch.testing.assert_close(norms.double(), x.detach().norm(dim=1), rtol=1e-6, atol=0)

    grad = random(2 * n, d, seed=3).float()
    outputs = [torch.empty_like(anchors), arranged(torch.empty_like(positives), how)]
    l2_normalize_backward(grad, anchors, positives, norms, *outputs)
    (exact,) = torch.autograd.grad(want, x, grad.double())
    got = torch.cat(outputs).double()
    rounding = {HALF: 2**-11, BFLOAT: 2**-8}.get(dtype, 1e-6)
    torch.testing.assert_close(got, exact, rtol=2 * rounding, atol=1e-6)


def test_l2_normalize_of_zeros_and_nan():
    x = torch.tensor([[0.0, 0, 0], [1e-13, 0, 0], [1, math.nan, 2], [3, 0, 4]], device=DEVICE)
    units, norms = torch.empty(8, 3, device=DEVICE), torch.empty(8, device=DEVICE)
    l2_normalize(x, x, units, norms)
    torch.testing.assert_close(units[:2], torch.tensor([[0.0, 0, 0], [0.1, 0, 0]], device=DEVICE))
    assert units[2].isnan().all() and norms[2].isnan()
    grads = torch.empty_like(x), torch.empty_like(x)
    l2_normalize_backward(torch.ones(8, 3, device=DEVICE), x, x, norms, *grads)
    assert not grads[0][:2].any() and grads[0][2].isnan().all()
    torch.testing.assert_close(grads[0][3], (1 - 1.4 * x[3] / 5) / 5)
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_the_whole_loss(dtype):
    """Normalised rows, losses and both gradients, as copgen_fast.ops puts them together."""
    n, d, case = 20, 24, square(40, 24, 0.1, dtype)
    anchors, positives = random(n, d).float(), random(n, d, seed=1).float()
    units, norms = torch.empty(2 * n, d, dtype=dtype, device=DEVICE), torch.empty(2 * n, device=DEVICE)
    l2_normalize(anchors, positives, units, norms)
    losses, lse = fused_losses(case, units, None)
    grad = fused_gradients(case, units, None, (lse, torch.full_like(lse, 1 / (2 * n))), None)
    grads = torch.empty_like(anchors), torch.empty_like(positives)
    l2_normalize_backward(grad, anchors, positives, norms, *grads)
    x = torch.cat([anchors, positives]).double().requires_grad_()
    want = plain_losses(case, torch.nn.functional.normalize(x, dim=1), None)[0].mean()
    (exact,) = torch.autograd.grad(want, x)
    relative = 2e-3 if dtype == HALF else 2e-6
    torch.testing.assert_close(losses.double().mean(), want.detach(), rtol=relative, atol=0)
    assert (torch.cat(grads) - exact).norm() <= relative * exact.norm()


# What only a GPU shows.

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def step(rows, columns):
    """Every launch that there is, for as many rows as take a triangle."""
    case, rectangle = square(4096, 64, 0.1, HALF), Case(256, 4096, 64, 0.01, HALF)
    losses, lse = fused_losses(case, rows, None)
    nearest = fused_losses(rectangle, rows[:256], columns, None, True)
    grad = fused_gradients(case, rows, None, (lse, losses), None)
    return losses, *nearest, grad, fused_gradients(rectangle, rows[:256], columns, (nearest[1], nearest[0]), None)


@on_gpu
def test_nothing_waits_for_the_device():
    rows, columns = inputs(Case(4096, 4096, 64, 0.1, HALF))
    step(rows, columns)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(rows, columns)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_cuda_graph_replays_it():
    rows, columns = inputs(Case(4096, 4096, 64, 0.1, HALF))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(rows, columns)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(rows, columns)
    rows.copy_(rows.flip(0))
    graph.replay()
    for ours, again in zip(captured, step(rows, columns), strict=True):
        assert torch.equal(ours, again)


@on_gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("m", [300, 2100, 4100, 8200])
def test_the_blocks_that_only_large_ones_have(m, dtype):
    for d in (128, 300):
        case = square(m, d, 0.1, dtype)
        rows, _ = inputs(case)
        assert_losses(case, rows, None, fused_losses(case, rows, None), slack(case))
        assert_losses(case, rows, None, fused_losses(case, rows, None, math.inf), slack(case))
        row = statistics_of(case, rows, None)
        assert_gradients(case, rows, None, row, None, fused_gradients(case, rows, None, row, None), slack(case))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_the_whole_loss_in_every_form(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in torch.randn(2, 21, 12, generator=generator)]
    negatives = torch.randn(9, 12, generator=generator).to(DEVICE)
    options = {"labels": torch.arange(21, device=DEVICE) % 4 - 1, "negatives": negatives}
    for symmetric in (True, False):
        for given in ({}, options):
            ours, theirs = (
                info_nce(*inputs, symmetric=symmetric, **given, return_stats=True, backend=name)
                for name in ("triton", "reference")
            )
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FLOAT else {"rtol": 5e-3, "atol": 5e-3}
            torch.testing.assert_close(ours[0], theirs[0], **tolerance)
            # In half precision two candidates of a row may round to a tie in one of the two.
            one_row = 0 if dtype == FLOAT else 1.01 / len(inputs[0])
            torch.testing.assert_close(ours[1].contrastive_top1, theirs[1].contrastive_top1, rtol=1e-6, atol=one_row)
            of_ours, of_theirs = (torch.autograd.grad(loss, inputs) for loss in (ours[0], theirs[0]))
            torch.testing.assert_close(of_ours, of_theirs, **tolerance)
