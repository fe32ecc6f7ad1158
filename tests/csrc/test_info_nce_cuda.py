"""InfoNCE's CUDA kernels: values on the CPU (see helpers/cuda_on_cpu/) and on a GPU, registers and instructions."""

import json
import math
import os
import shutil
import subprocess
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.compile import cuda_kernels
from tests.helpers.info_nce_rows import (
    COLUMN,
    ROW,
    THIN,
    TRIANGLE,
    WIDE,
    Case,
    OnCpu,
    OnGpu,
    OnPtx,
    assert_gradients,
    assert_losses,
    check_huge_products,
    rectangular,
    square,
    unit,
    with_statistics,
)

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("copgen_fast._cuda") is None, reason="needs a GPU and copgen_fast._cuda"
)
SIZES = [1, 2, 3, 63, 64, 65, 97, 130, 200]
DIMENSIONS = [1, 3, 8, 64, 97, 128, 200, 300]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, compiled for the CPU."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "info_nce.so"
    emulator = ROOT / "tests" / "helpers" / "cuda_on_cpu"
    include = [f"-I{emulator}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'info_nce'}"]
    # Some compilers fortify by default, and then take the jump from one thread's stack to another's for an attack.
    options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *include]
    done = subprocess.run(
        [compiler, *options, str(emulator / "info_nce.cpp"), "-o", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return path


@pytest.fixture(params=["wide", "thin", pytest.param("gpu", marks=NO_GPU)])
def machine(request):
    if request.param == "gpu":
        return OnGpu()
    return OnCpu(request.getfixturevalue("library"), WIDE if request.param == "wide" else THIN)


@pytest.fixture
def triangle(library):
    return OnCpu(library, TRIANGLE)


def check(machine, case, kinds=(ROW, COLUMN)):
    assert_losses(case, *machine.losses(case)[:2])
    if kinds:
        assert_gradients(case, machine.gradients(with_statistics(case, kinds)))


# Numbers.


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("n", SIZES[1:])
def test_square(machine, n, bounded):
    check(machine, square(n, 24, 0.1, seed=n, bounded=bounded))


@pytest.mark.parametrize("m", [1, 2, 63, 65, 130])
def test_rectangular(machine, m):
    for number, k in enumerate(SIZES):
        kinds = [(ROW,), (COLUMN,), (ROW, COLUMN)][number % 3]
        check(machine, rectangular(m, k, 40, bounded=number % 2 == 0, shift=0 if k >= m else -1), kinds)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_dimensions(machine, d, bounded):
    check(machine, square(66, d, seed=d, bounded=bounded))
    check(machine, rectangular(33, 70, d, seed=d, bounded=bounded))


@pytest.mark.parametrize("kinds", [(ROW,), (COLUMN,), (ROW, COLUMN)], ids="+".join)
@pytest.mark.parametrize("rank", range(3))
def test_ranks(machine, rank, kinds):
    # Three ranks of 34 rows each; their gathered columns, a row's own among them or not.
    m = 34
    for exclude_self in (True, False):
        shift = m // 2 if exclude_self else 0
        case = rectangular(m, 3 * m, 32, offset=rank * m, shift=shift, exclude_self=exclude_self)
        if exclude_self:
            case.columns[rank * m : (rank + 1) * m] = case.rows
        check(machine, case, kinds)


def test_without_targets(machine):
    check(machine, rectangular(65, 130, 32, shift=-1), (ROW,))
    case = square(65, 32, shift=-1)
    losses, lse, *_ = machine.losses(case)
    torch.testing.assert_close(lse, case.temperature * losses)
    check(machine, case)


@pytest.mark.parametrize("shift", [1, 16, 64, 95])
def test_targets_wrap_around(machine, shift):
    check(machine, square(96, 16, shift=shift), kinds=())
    check(machine, rectangular(96, 128, 16, shift=shift, offset=17), (ROW, COLUMN))


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07, 0.1, 1.0])
def test_temperatures(machine, temperature):
    check(machine, square(130, 64, temperature))
    check(machine, rectangular(40, 130, 64, temperature))


@pytest.mark.parametrize("norm", [10, 30])
def test_logits_far_below_and_above_zero(machine, norm):
    # Columns that point away from every row, and towards it.
    for sign in (-1, 1):
        near = torch.nn.functional.normalize(torch.ones(1, 32) + 0.1 * torch.randn(70, 32), dim=1)
        case = Case((norm * near[:66]).half(), (sign * norm * near).half(), 0.1, math.inf, 0, 0)
        losses, lse, *_ = machine.losses(case)
        assert lse.isfinite().all() and (lse.sign() == sign).all()
        assert_losses(case, losses, lse)
        assert_gradients(case, machine.gradients(with_statistics(case, (ROW, COLUMN))))


@pytest.mark.parametrize("symmetric", [True, False])
def test_huge_products(machine, symmetric):
    check_huge_products(machine, torch.float16, symmetric)


@pytest.mark.parametrize("bounded", [True, False])
def test_opposite_unit_vectors(machine, bounded):
    # The widest range that counts as bounded: logits of -40 alone in a sum.
    row = unit(1, 16, 0)
    case = Case(torch.cat([row, -row]), None, 1 / 40, 40.0 if bounded else math.inf, 0, 1, True)
    check(machine, case)


@pytest.mark.parametrize("where", ["row", "column"])
@pytest.mark.parametrize("bounded", [True, False])
def test_nan_reaches_what_it_touches_and_no_more(machine, where, bounded):
    case = rectangular(66, 70, 16, bounded=bounded)
    with_statistics(case, (ROW,))
    (case.rows if where == "row" else case.columns)[65, 3] = math.nan
    losses, lse, nearest, _ = machine.losses(case, nearest=True)
    grad = machine.gradients(case)
    if where == "row":
        assert losses[65].isnan() and lse[65].isnan() and losses[:65].isfinite().all() and lse[:65].isfinite().all()
        assert grad[65].isnan().all() and grad[:65].isfinite().all()
    else:
        assert losses.isnan().all() and lse.isnan().all() and grad.isnan().all()
    assert ((nearest >= 0) & (nearest < 70)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30, -1.0])
def test_gradients_of_any_size(machine, scale):
    for case in (square(66, 32), rectangular(66, 70, 32), rectangular(33, 70, 32, bounded=False)):
        grad = machine.gradients(with_statistics(case, (ROW, COLUMN), scale))
        assert_gradients(case, grad)
        assert grad.any()


def test_gradients_of_different_sizes(machine):
    # The largest counts, wherever it is.
    case = with_statistics(rectangular(66, 70, 32), (ROW, COLUMN))
    case.grads[ROW][7] *= 1e6
    assert_gradients(case, machine.gradients(case))
    case.grads[COLUMN][69] *= 1e12
    assert_gradients(case, machine.gradients(case))


def test_no_gradient_is_none(machine):
    case = with_statistics(rectangular(66, 70, 32), (ROW, COLUMN), 0.0)
    assert not machine.gradients(case).any()


@pytest.mark.parametrize("bounded", [True, False])
def test_nearest(machine, bounded):
    for case in (square(97, 16, bounded=bounded), rectangular(30, 130, 16, offset=50, exclude_self=True, shift=-1)):
        losses, lse, nearest, logit = machine.losses(case, nearest=True)
        assert_losses(case, losses, lse)
        s = case.logits().masked_fill(~case.masks()[0], -math.inf)
        torch.testing.assert_close(s.gather(1, nearest[:, None])[:, 0], s.amax(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(logit.double(), s.amax(1), rtol=0, atol=1e-5)


def test_the_first_of_equals_is_nearest(machine):
    case = rectangular(20, 130, 16, offset=30, exclude_self=True, shift=-1)
    case.columns[:] = case.columns[:1]
    assert not machine.losses(case, nearest=True)[2].any()
    case.rows[0], case.columns[0], case.columns[64], case.columns[129] = 1, 0.5, 1, 1
    assert machine.losses(case, nearest=True)[2][0] == 64


def test_no_worse_than_pytorch_in_half_precision(machine):
    case = with_statistics(square(200, 128), (ROW,))
    losses, lse, *_ = machine.losses(case)
    grad = machine.gradients(case)
    for ours, exact, theirs in (
        (losses, case.losses()[0], case.losses(torch.float16)[0]),
        (lse, case.losses()[1], case.losses(torch.float16)[1]),
        (grad, case.grad_rows(), case.grad_rows(torch.float16)),
    ):
        assert (ours.double() - exact).abs().max() <= (theirs.double() - exact).abs().max()


# The triangle.


@pytest.mark.parametrize("band", [1, 2, 9])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 128, 130, 200, 260, 330])
def test_triangle(triangle, n, band):
    for shift in (n // 2, -1, 1):
        case = square(n, 16, seed=n, shift=shift)
        assert_losses(case, *triangle.losses(case, band)[:2])


@pytest.mark.parametrize("d", DIMENSIONS)
def test_dimensions_of_a_triangle(triangle, d):
    case = square(150, d)
    assert_losses(case, *triangle.losses(case, 3)[:2])


def test_nan_in_a_triangle(triangle):
    case = square(150, 16)
    case.rows[70, 3] = math.nan
    losses, lse, *_ = triangle.losses(case, 2)
    assert losses.isnan().all() and lse.isnan().all()


def test_when_a_triangle_is_chosen(triangle):
    def chosen(m, bound=10.0, square=True, nearest=False, multiprocessors=68):
        return triangle.choose(m, bound, multiprocessors, square, nearest)

    assert chosen(448) == THIN and chosen(2048) == THIN and chosen(4352, math.inf) == WIDE
    assert chosen(4096) == TRIANGLE and chosen(65536) == TRIANGLE
    assert chosen(65536, square=False) == chosen(65536, nearest=True) == chosen(65536, 40.1) == WIDE
    assert chosen(4096, multiprocessors=132) == THIN
    limit = 8 << 20
    assert triangle.library.choose_band(4096, limit) == 64  # all at once
    assert triangle.library.choose_band(0, limit) == 1  # nothing to divide by
    assert triangle.library.choose_band(65536, limit) == 128 and triangle.library.choose_band(2**30, limit) == 1


# What a GPU would let pass. Every test above has tensors without anything behind them, blocks and warps in a random
# order, and shared memory that is NaN before each block.


@pytest.mark.parametrize("plan", [WIDE, THIN, TRIANGLE])
def test_order_of_blocks_and_warps_does_not_matter(library, plan):
    case = with_statistics(square(200, 150), (ROW,))
    results = []
    for order in (0, 1, 2, 3):
        machine = OnCpu(library, plan, order)
        results.append(machine.losses(case, band=2)[:2])
        if plan != TRIANGLE:
            results[-1].append(machine.gradients(case))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("plan", [WIDE, THIN, TRIANGLE])
def test_nothing_before_a_tensor_is_accessed(library, plan):
    machine = OnCpu(library, plan, at_start=True)
    case = with_statistics(square(97, 24), (ROW,))
    assert_losses(case, *machine.losses(case, band=2, nearest=plan != TRIANGLE)[:2])
    if plan != TRIANGLE:
        check(machine, rectangular(30, 70, 24, offset=40, shift=29))


def launch_fault(library, name, order=2, **options):
    """64 zeros after a kernel of helpers/cuda_on_cpu/faults.h."""
    machine = OnCpu(library, WIDE, order, **options)
    with ExitStack() as kept:
        values = machine.fenced(kept, torch.zeros(64))
        machine.call(machine.library.launch_fault, name.encode(), values)
        return values.clone()


def test_the_emulator_notices_faults(library):
    assert (launch_fault(library, "faultless") == 1).all()
    assert launch_fault(library, "reads_what_is_unwritten").isnan().all()
    orders = [launch_fault(library, "lacks_a_barrier", order) for order in (0, 1, 2)]
    assert not torch.equal(orders[0], orders[1])
    for name in ("waits_alone", "waits_apart"):
        with pytest.raises(AssertionError, match="never come"):
            launch_fault(library, name)
    for name, at_start in (("reads_beyond", False), ("writes_before", True)):
        launch_fault(library, name, at_start=not at_start)
        with pytest.raises(AssertionError, match="beyond a tensor"):
            launch_fault(library, name, at_start=at_start)


# On a GPU only: what chooses between plans, at sizes that choose differently.


@NO_GPU
@pytest.mark.parametrize("n", [448, 2050, 8500, 9000])
def test_large_on_a_gpu(n):
    machine = OnGpu()
    for case in (square(n, 128), square(n, 128, 0.02), rectangular(n // 2, n, 128)):
        case = with_statistics(case, (ROW,))
        first = [*machine.losses(case)[:2], machine.gradients(case)]
        again = [*machine.losses(case)[:2], machine.gradients(case)]
        assert all(map(torch.equal, first, again))
        assert_losses(case, *first[:2])
        assert_gradients(case, first[2])


# Compilation.


@pytest.fixture(scope="module")
def compiled():
    """{target: PTX and rows}, compiled now, all targets side by side."""
    if cuda_kernels.tool("nvcc") is None:
        pytest.skip("needs nvcc")
    return cuda_kernels.compile_all()


@pytest.mark.parametrize(
    ("plan", "made", "kinds"),
    [
        (WIDE, lambda: square(66, 24), (ROW,)),
        (THIN, lambda: rectangular(33, 70, 97, bounded=False), (ROW, COLUMN)),
        (TRIANGLE, lambda: square(130, 24), ()),
    ],
    ids=["wide", "thin", "triangle"],
)
def test_values_of_what_the_compiler_made(compiled, plan, made, kinds):
    check(OnPtx(compiled[75]["ptx"], plan), made(), kinds)


TARGETS = [75, 80]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target}")
def test_no_kernel_spills(compiled, target):
    rows = compiled[target]["rows"]
    assert len(rows) == 14
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["shared_bytes"] <= 48 << 10, row
        assert row["spill_stores_bytes"] == row["spill_loads_bytes"] == row["stack_bytes"] == 0, row


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target}")
def test_products_are_the_tensor_cores(compiled, target):
    text = compiled[target]["ptx"]
    assert "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32" in text and "ldmatrix" in text
    assert "cp.async" not in text
    counts = {(row["kernel"], row["hmma"]) for row in compiled[target]["rows"]}
    if cuda_kernels.tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump to see the machine code")
    assert all((count > 0) == (kernel != "triangle_sums_kernel") for kernel, count in counts)


def test_the_committed_results_list_the_same_kernels(compiled):
    committed = json.loads(cuda_kernels.RESULTS.read_text())["rows"]
    now = [row for target in TARGETS for row in compiled[target]["rows"]]
    names = ("kernel", "variant", "target")
    assert [[row[name] for name in names] for row in committed] == [[row[name] for name in names] for row in now]
