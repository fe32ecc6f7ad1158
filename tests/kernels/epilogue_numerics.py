"""kernels/epilogue.py against the same chunks in PyTorch's operators; run as info_nce_numerics.py is."""

import pytest
import torch

from copgen_fast.kernels import epilogue
from copgen_fast.ops import info_nce
from copgen_fast.ops.info_nce import chunked
from tests.helpers.kernel_processes import this_process_device

DEVICE = this_process_device()


@pytest.fixture
def fused(monkeypatch):
    """The chunked backend with these kernels, two chunks or more."""
    monkeypatch.setattr(chunked, "_CHUNK", {"cpu": 400})
    monkeypatch.setattr(chunked, "_CHUNK_ELSEWHERE", 400)
    return lambda on: monkeypatch.setattr(chunked, "_epilogue", lambda rows: epilogue if on else None)


def both(fused, inputs, **options):
    found = []
    for on in (True, False):
        fused(on)
        loss, stats = info_nce(*inputs, backend="chunked", return_stats=True, **options)
        found.append([loss, *stats, *torch.autograd.grad(loss, inputs)])
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.01}, {"labels": True, "negatives": True}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_chunk_read_once_gives_the_same(fused, symmetric, options, n):
    generator = torch.Generator().manual_seed(n)
    inputs = [x.to(DEVICE).requires_grad_() for x in torch.randn(2, n, 7, generator=generator)]
    given = dict(options)
    if "labels" in given:
        given["labels"] = torch.arange(n, device=DEVICE) % 4 - 1
        given["negatives"] = torch.randn(1100, 7, generator=generator).to(DEVICE)
    for ours, theirs in zip(*both(fused, inputs, symmetric=symmetric, **given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_long_rows_of_very_negative_logits(fused):
    angle = torch.linspace(0, 3.1, 40)
    rows = torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(1, 30, 40)[:, None]
    inputs = [x.to(DEVICE).requires_grad_() for x in (rows, -rows)]
    for ours, theirs in zip(*both(fused, inputs, normalize=False), strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_nan_spreads(fused):
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rows[2, 1] = torch.nan
    fused(True)
    losses = info_nce(rows.to(DEVICE), rows.to(DEVICE), symmetric=False, reduction="none", backend="chunked")
    assert losses.isnan().all()
