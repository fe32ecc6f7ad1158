"""Convolutions in the C++ extension's tiles, beside PyTorch's as they are written: any size, any layout of weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.ops import tiles, winograd

pytestmark = pytest.mark.skipif(not tiles.built(), reason="the C++ extension is not built")
bfloat16 = pytest.mark.skipif(
    not tiles.compiled(torch.empty(0, dtype=torch.bfloat16)), reason="no instructions for bfloat16"
)
FORMS = {"winograd": winograd.prepare, "differences": convolutions.DIFFERENCES.prepare}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_written(form, x, weight, bias=None):
    x = x.permute(0, 3, 1, 2)
    x = F.interpolate(x, scale_factor=2) if form == "differences" else x
    return F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)


def gradient_as_written(form, x, weight, gradient):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(as_written(form, x, weight), x, gradient)[0]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    sides=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    channels=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    others=st.tuples(*[st.booleans()] * 4),
)
def test_values_and_gradients_are_the_convolutions(form, n, sides, channels, others):
    """Odd sides leave tiles that reach beyond the border; channels, some that fill no vector."""
    styled, biased, added, relu = others
    x, weight = drawn(n, *sides, channels[0]), drawn(channels[1], channels[0], 3, 3, seed=1)
    styles, bias = drawn(n, channels[0], seed=2), drawn(channels[1], seed=3)
    expected = as_written(form, x * styles[:, None, None] if styled else x, weight, bias if biased else None)
    more = drawn(*expected.shape, seed=4)
    expected = expected + more if added else expected
    expected = expected.relu() if relu else expected
    prepared = FORMS[form](weight)
    given = {"styles": styles if styled else None, "bias": bias if biased else None, "added": more if added else None}
    found = tiles.convolve(x, prepared, form, torch.empty(expected.shape, dtype=x.dtype), **given, relu=relu)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    exact = gradient_as_written(form, x, weight, more)
    for turned in (prepared.transpose(1, 2), prepared.transpose(1, 2).contiguous()):
        found = tiles.convolve(more, turned, f"{form} adjoint", torch.empty_like(x))
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tiles.convolve_transposed(more, prepared, f"{form} adjoint", found), exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "count"), [(40, 32), (600, 7)], ids=["many tiles", "many channels"])
def test_float32_is_the_same_by_any_number_of_threads(form, channels, count):
    x, weight = drawn(count, 12, 12, channels).float(), drawn(160, channels, 3, 3, seed=1).float()
    prepared, scale = FORMS[form](weight), 2 if form == "differences" else 1
    gradient = drawn(count, 12 * scale, 12 * scale, 160, seed=2).float()
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 7, 40):
        torch.set_num_threads(threads)
        found.append(tiles.convolve(x, prepared, form, torch.empty_like(gradient)))
        found.append(tiles.convolve_transposed(gradient, prepared, f"{form} adjoint", torch.empty_like(x)))
    torch.set_num_threads(before)
    assert all(y.equal(found[i % 2]) for i, y in enumerate(found))
    expected = as_written(form, x.double(), weight.double())
    assert (found[0] - expected).norm() <= 1e-5 * expected.norm()


@bfloat16
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3, 8, 65])
def test_bfloat16_rounds_values_weights_and_outputs(form, channels):
    x, weight = drawn(3, 9, 7, channels).bfloat16(), drawn(48, channels, 3, 3, seed=1).float()
    expected = as_written(form, x.double(), weight.double())
    out = torch.empty(expected.shape, dtype=torch.bfloat16)
    found = tiles.convolve(x, tiles.pairs(FORMS[form](weight)).bfloat16(), form, out)
    assert (found.double() - expected).norm() <= 0.016 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_rows_from_any_row_of_tiles_on(form):
    """And images that are views: only their channels have to be adjacent."""
    x, prepared = drawn(2, 16, 8, 10)[..., 1:7], FORMS[form](drawn(5, 6, 3, 3, seed=1))
    scale = 2 if form == "differences" else 1
    whole = tiles.convolve(x, prepared, form, x.new_empty(2, 16 * scale, 8 * scale, 5))
    part = tiles.convolve(x, prepared, form, torch.full_like(whole, torch.nan)[:, 4:12], first=4)
    assert part.equal(whole[:, 4:12])


def test_a_processor_without_instructions_or_another_dtype_takes_pytorchs_operators(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    assert [tiles.compiled(torch.empty(0, dtype=dtype)) for dtype in dtypes] == [True, True, False, False]
    assert not tiles.compiled(torch.empty(0, device="meta"))
