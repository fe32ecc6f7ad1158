"""The Triton kernels of InfoNCE and of L2 normalisation against float64.

The interpreter takes some 10 ms a tile, so matrices are small, and sizes, temperatures and dtypes take turns.
"""

import math
from functools import partial

import pytest
import torch
from copgen_fast.kernels.l2_normalize import l2_normalize, l2_normalize_backward

from copgen_fast.ops import info_nce
from tests.helpers.info_nce_rows import (
    COLUMN,
    ROW,
    Case,
    OnTriton,
    assert_gradients,
    assert_losses,
    check_huge_products,
    rectangular,
    square,
    with_statistics,
)
from tests.helpers.on_gpu import captured, needs_gpu, no_waiting
from tests.helpers.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TRITON = OnTriton()
SQUARE = [
    partial(square, 2, 3, 0.1, HALF),
    partial(square, 3, 64, 0.01, FLOAT),
    partial(square, 63, 300, 0.07, BFLOAT),
    partial(square, 64, 128, 0.1, FLOAT),
    partial(square, 65, 97, 0.01, HALF),
    partial(square, 97, 1, 1, FLOAT),
    partial(square, 130, 64, 0.07, HALF),
    partial(square, 200, 128, 0.01, BFLOAT),
]
RECTANGULAR = [
    partial(rectangular, 1, 1, 3, 0.1, FLOAT),
    partial(rectangular, 63, 63, 128, 0.07, HALF),
    partial(rectangular, 97, 97, 64, 0.01, FLOAT),
    partial(rectangular, 17, 20, 300, 0.07, FLOAT, 3, -1),
    # Ranks, whose rows are a slice of the columns.
    partial(rectangular, 64, 192, 97, 0.1, HALF, 64, 32, True),
    partial(rectangular, 33, 130, 300, 0.07, HALF, 97, 16, True),
    partial(rectangular, 66, 200, 64, 0.01, BFLOAT, 0, 33, True),
    partial(rectangular, 30, 100, 64, 0.1, BFLOAT, 70, 0, False),
    # Negatives alone.
    partial(rectangular, 3, 200, 64, 0.07, HALF, 0, -1, False),
    partial(rectangular, 65, 1, 1, 1, FLOAT, 0, -1, False),
]
SPLIT = partial(rectangular, 20, 700, 64, 0.1, HALF, 600, 10, True)


def each(cases):
    return pytest.mark.parametrize("made", cases, ids=lambda made: "-".join(map(str, made.args)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def check_losses(case, nearest=False, **options):
    losses, lse, *best = TRITON.losses(case, nearest, **options)
    assert_losses(case, losses, lse)
    if nearest:
        logit, column = case.logits().masked_fill(~case.masks()[0], -math.inf).max(1)
        assert torch.equal(best[0], column)
        torch.testing.assert_close(best[1].double(), logit, rtol=1e-6, atol=1e-6)


def check_gradients(case, kinds=(ROW, COLUMN), **options):
    with_statistics(case, kinds)
    assert_gradients(case, TRITON.gradients(case, **options))


# Losses.


@each(SQUARE + RECTANGULAR)
def test_losses(made):
    check_losses(made())


@each([SQUARE[3], SQUARE[4], RECTANGULAR[3]])
def test_losses_without_a_bound(made):
    check_losses(made(bounded=False))


@each([partial(square, 2, 64, 0.1, FLOAT), partial(square, 65, 64, 0.07, FLOAT), SQUARE[6], SQUARE[7]])
@pytest.mark.parametrize("scratch_bytes", [2**25, 1], ids=["one band", "bands"])
def test_losses_by_triangles(made, scratch_bytes):
    case = made()
    case.bound = 40.0
    check_losses(case, triangle_from=1, scratch_bytes=scratch_bytes)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_triangles_with_every_number_of_blocks(count):
    # An even number of blocks has opposite ones. Blocks of float32 have 64 rows.
    case = square(64 * count - 7, 3, 0.1, FLOAT)
    for scratch_bytes in (2**25, 4 * len(case.rows) * 4):
        check_losses(case, triangle_from=1, scratch_bytes=scratch_bytes)


@pytest.mark.parametrize("bounded", [True, False])
def test_losses_of_split_columns(bounded):
    check_losses(SPLIT(bounded=bounded), nearest=True, split_from=1)


def test_logits_that_are_all_very_negative():
    rows, columns = (random(n, 16, seed=n).abs().float().cpu() + 2 for n in (20, 40))
    case = Case(rows, -columns, 0.5, shift=0)
    assert TRITON.losses(case)[1].max() < -50
    check_losses(case)
    check_gradients(case, (ROW,))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("symmetric", [True, False])
def test_huge_products(dtype, symmetric):
    check_huge_products(TRITON, dtype, symmetric)


@pytest.mark.parametrize("bounded", [True, False])
def test_nan_reaches_the_losses_it_touches(bounded):
    case = rectangular(40, 70, 16, 0.1, FLOAT, bounded=bounded)
    case.rows[3, 2] = math.nan
    losses, lse, nearest, _ = TRITON.losses(case, nearest=True)
    assert losses.isnan().nonzero().flatten().tolist() == lse.isnan().nonzero().flatten().tolist() == [3]
    assert ((nearest >= 0) & (nearest < 70)).all()
    case.columns[69] = math.nan
    assert TRITON.losses(case)[0].isnan().all()
    case = square(130, 16, 0.1, FLOAT)
    case.rows[100] = math.nan
    assert TRITON.losses(case, triangle_from=1)[0].isnan().all()


@each([SQUARE[3], SQUARE[4], RECTANGULAR[3], RECTANGULAR[7]])
def test_nearest(made):
    check_losses(made(), nearest=True)


@pytest.mark.parametrize("split_from", [1, 10**6])
def test_of_ties_the_first_is_top(split_from):
    case = Case(torch.ones(5, 4).half(), torch.zeros(600, 4).half(), shift=0)
    case.columns[[7, 40, 500]] = 1
    assert TRITON.losses(case, nearest=True, split_from=split_from)[2].tolist() == [7] * 5
    case.columns[:] = -1
    assert TRITON.losses(case, nearest=True, split_from=split_from)[2].tolist() == [0] * 5


# Gradients.


@each(SQUARE)
def test_gradients_of_square_ones(made):
    check_gradients(made())


@each(RECTANGULAR)
def test_gradients_of_rectangular_ones(made):
    for kinds in ((ROW,), (COLUMN,), (ROW, COLUMN)):
        check_gradients(made(), kinds)


def test_gradients_without_a_bound_and_of_split_columns():
    check_gradients(square(40, 16, 0.1, HALF, bounded=False))
    check_gradients(SPLIT(), (ROW,), split_from=1)


@pytest.mark.parametrize("bounded", [True, False])
def test_gradients_by_factors_of_a_launch_of_their_own(bounded):
    check_gradients(square(97, 64, 0.07, HALF, bounded=bounded), factors_from=1)
    for kinds in ((ROW,), (COLUMN,), (ROW, COLUMN)):
        check_gradients(rectangular(33, 130, 64, 0.07, HALF, 97, 16, True, bounded=bounded), kinds, factors_from=1)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("bounded", [True, False])
def test_gradients_of_any_size(dtype, bounded):
    case = with_statistics(square(34, 16, 0.1, dtype, bounded=bounded), (ROW,))
    one, grad = TRITON.gradients(case), case.grads[ROW]
    for factor in (1e-30, 1e30, -1):
        case.grads[ROW] = factor * grad
        scaled = TRITON.gradients(case)
        torch.testing.assert_close(
            scaled.double() / factor, one.double(), rtol=1e-4, atol=1e-5 * one.abs().max().item()
        )
    case.grads[ROW] = 0 * grad
    assert not TRITON.gradients(case).any()


def test_small_losses_have_precise_gradients():
    # All rows at their targets, which have nearly all the weight: 1 - p is what is left, and is not rounded from 1.
    case = with_statistics(Case(torch.eye(16).bfloat16(), torch.eye(16).bfloat16(), 0.1, 10.0, shift=0), (ROW,))
    wanted = case.grad_rows()
    assert (TRITON.gradients(case).double() - wanted).norm() <= 2**-6 * wanted.norm() + 2**-22 * case.grads[ROW].norm()


def test_two_runs_are_bit_equal():
    case = with_statistics(square(100, 16, 0.1, HALF), (ROW,))
    assert torch.equal(*(TRITON.losses(case, triangle_from=1)[0] for _ in range(2)))
    assert torch.equal(*(TRITON.gradients(case, split_from=1) for _ in range(2)))


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


# What only a GPU shows.


def step(rows, columns):
    """Every launch that there is, for as many rows as take a triangle."""
    n, few, numbers = len(rows), 256, partial(torch.empty, device=DEVICE)
    losses, lse = numbers(2, n)
    TRITON.row_losses(rows, None, 0.1, 10.0, 0, n // 2, True, losses, lse, None, None)
    nearest = [*numbers(2, few), numbers(few, dtype=torch.int64), numbers(few)]
    TRITON.row_losses(rows[:few], columns, 0.01, 100.0, 0, 0, False, *nearest)
    grads = numbers(n, rows.shape[1]), numbers(few, rows.shape[1])
    TRITON.row_gradients(rows, None, 0.1, 10.0, lse, losses, None, None, 0, n // 2, True, grads[0])
    of_rows = (nearest[1], nearest[0], None, None)
    TRITON.row_gradients(rows[:few], columns, 0.01, 100.0, *of_rows, 0, 0, False, grads[1])
    return losses, *nearest, *grads


@pytest.fixture
def large():
    return [torch.nn.functional.normalize(random(4096, 64, seed=seed), dim=1).half() for seed in (0, 1)]


@needs_gpu
def test_nothing_waits_for_the_device(large):
    step(*large)
    with no_waiting():
        step(*large)


@needs_gpu
def test_a_cuda_graph_replays_it(large):
    rows, columns = large
    graph, results = captured(lambda: step(rows, columns))
    rows.copy_(rows.flip(0))
    graph.replay()
    for ours, again in zip(results, step(rows, columns), strict=True):
        assert torch.equal(ours, again)


@needs_gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("m", [300, 2100, 4100, 8200])
def test_the_blocks_that_only_large_ones_have(m, dtype):
    for d in (128, 300):
        check_losses(square(m, d, 0.1, dtype))
        check_losses(square(m, d, 0.1, dtype, bounded=False))
        check_gradients(square(m, d, 0.1, dtype))


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
