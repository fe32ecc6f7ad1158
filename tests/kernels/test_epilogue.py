"""The Triton kernels of the chunked InfoNCE against its PyTorch operators, a chunk at a time."""

import pytest
import torch
from copgen_fast.kernels.epilogue import losses_of, weigh

from copgen_fast.ops.info_nce import chunked
from tests.helpers.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
CASES = {  # m, k (None: the columns are the rows), offset, shift, exclude_self
    "one pair": (2, None, 0, 1, True),
    "symmetric": (30, None, 0, 15, True),
    "one-sided": (30, 30, 0, 0, False),
    "a rank's rows": (20, 60, 20, 10, True),
    "without targets": (5, 1100, 0, -1, False),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def chunks(rows, columns):
    """Slices of the rows and their float32 products with all columns: two chunks."""
    for here in (slice(0, len(rows) // 2 + 1), slice(len(rows) // 2 + 1, len(rows))):
        if len(rows[here]):
            yield here, (rows[here] @ columns.T).float()


def assert_same(rows, columns, temperature, offset, shift, exclude_self, tolerance=2e-5):
    """Losses, log-sum-exps, nearest columns and their logits, and gradients of rows and columns alone and together."""
    m, everything, rest = len(rows), rows if columns is None else columns, (offset, shift, exclude_self)
    theirs = [*normal(2, m), torch.zeros(m, dtype=torch.int64, device=DEVICE), normal(m)]
    chunked.row_losses(rows, columns, temperature, torch.inf, *rest, *theirs)
    ours = [x.to(torch.float32) if x.is_floating_point() else x.clone() for x in theirs]
    for here, products in chunks(rows, everything):
        losses_of(products, temperature, here.start, m, *rest, *(x[here] for x in ours))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)

    of_rows = (theirs[1], normal(m, seed=2))
    of_columns = (
        of_rows
        if columns is None
        else (
            temperature * normal(len(columns), seed=3) + theirs[1].max(),
            normal(len(columns)),
        )
    )
    for kinds in ((of_rows, of_columns),) if columns is None else ((of_rows, (None, None)), (of_rows, of_columns)):
        given = [x for pair in kinds for x in pair]
        wanted = torch.empty_like(rows)
        chunked.row_gradients(rows, columns, temperature, torch.inf, *given, *rest, wanted)
        by_row, by_column = ([None if x is None else x.float() for x in pair] for pair in kinds)
        for here, products in chunks(rows, everything):
            sliced = [None if x is None else x[here] for x in by_row]
            weigh(products, temperature, here.start, m, *rest, *sliced, *by_column)
            found = products.double() @ everything / temperature
            scale = wanted.abs().max().item()
            torch.testing.assert_close(found, wanted[here], rtol=tolerance, atol=5 * tolerance * max(scale, 1))


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_a_chunk_read_once_gives_the_same(case, temperature):
    m, k, *rest = CASES[case]
    rows = torch.nn.functional.normalize(normal(m, 7), dim=1)
    columns = None if k is None else torch.nn.functional.normalize(normal(k, 7, seed=1), dim=1)
    assert_same(rows, columns, temperature, *rest)


def test_long_rows_of_very_negative_logits():
    angle = torch.linspace(0, 3.1, 40, dtype=torch.float64)
    rows = torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(1, 30, 40)[:, None]
    rows = torch.cat([rows, -rows]).to(DEVICE)
    assert_same(rows, None, 0.1, 0, 40, True, tolerance=1e-4)


def test_nan_spreads():
    rows = normal(6, 4).float()
    rows[2, 1] = torch.nan
    losses, lse = torch.zeros(2, 6, device=DEVICE)
    losses_of(rows @ rows.T, 0.1, 0, 6, 0, 0, False, losses, lse, None, None)
    assert losses.isnan().all() and lse.isnan().all()
