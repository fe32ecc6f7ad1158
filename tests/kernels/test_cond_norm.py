"""The Triton kernels of the conditional normalisation against the reference."""

import pytest
import torch

from copgen_fast.kernels import cond_norm as kernels
from copgen_fast.ops import cond_norm
from tests.helpers.triton_device import DEVICE

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# The interpreter cuts bfloat16 where a GPU rounds.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(shape, dtype=torch.float64, layout=torch.contiguous_format, rows=None):
    x = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    affine = torch.randn(2, rows or shape[0], shape[1], generator=seeded(1), dtype=torch.float64)
    leaves = (x.to(DEVICE, dtype, memory_format=layout), *affine.to(DEVICE, torch.promote_types(dtype, torch.float32)))
    return [y.requires_grad_() for y in leaves]


def assert_same(inputs, upsample=False):
    """Values and gradients are the reference's."""
    found = []
    for backend in ("triton", "reference"):
        y = cond_norm(*inputs, upsample=upsample, backend=backend)
        weights = torch.randn(y.shape, generator=seeded(5), dtype=torch.float64).to(y)
        found.append([y.detach(), *torch.autograd.grad(y, inputs, weights)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        error = (ours.double() - theirs.double()).norm()
        assert error <= RELATIVE[inputs[0].dtype] * theirs.double().norm()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 97, 3, 1), (1, 3, 9, 113), (2, 70, 1, 2)], ids=str)
def test_odd_sizes(layout, upsample, shape):
    assert_same(drawn(shape, layout=layout), upsample)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(layout, dtype):
    assert_same(drawn((2, 5, 4, 3), dtype, layout), upsample=dtype == torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_several_parts_of_several_steps(layout, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "BESIDE", 16)
    monkeypatch.setattr(kernels, "STEPS", 3)
    assert_same(drawn((2, 19, 11, 9), layout=layout))


def test_rows_apart_and_one_for_all():
    x, *_ = drawn((2, 4, 3, 3))
    together = torch.randn(2, 10, generator=seeded(2), dtype=torch.float64).to(DEVICE)
    for affine in (together[:, :8].chunk(2, 1), together[:1, :8].chunk(2, 1), (together[:, ::2][:, :4],) * 2):
        ours, theirs = (cond_norm(x, *affine, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(n):
    inputs = drawn((n, 3, 2, 2), rows=1)
    y = cond_norm(*inputs, backend="triton")
    y.sum().backward()
    assert y.shape == (n, 3, 2, 2) and all(leaf.grad.shape == leaf.shape for leaf in inputs)


def test_nan_stays_and_zero_gets_no_gradient():
    x, scale, shift = (y.detach() for y in drawn((1, 3, 2, 3), torch.float32))
    x[0, 1, 1, 2] = torch.nan
    x[0, 2] = shift[0, 2] = 0
    x.requires_grad_()
    y = cond_norm(x, scale, shift, backend="triton")
    assert y.isnan().sum() == 1 and y[0, 1, 1, 2].isnan()
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not grad[0, 2].any() and grad[0, 1, 1, 2] == scale[0, 1]


def test_what_is_overwritten():
    for layout in LAYOUTS:
        x, scale, shift = (y.detach() for y in drawn((2, 5, 3, 4), layout=layout))
        wanted = cond_norm(x, scale, shift, backend="reference")
        y = cond_norm(x, scale, shift, inplace=True, backend="triton")
        assert y.data_ptr() == x.data_ptr()
        torch.testing.assert_close(x, wanted)


def test_two_runs_are_bit_equal_and_gradients_scale():
    inputs = drawn((2, 5, 6, 7), torch.float32, torch.channels_last)
    y = cond_norm(*inputs, backend="triton")
    once, again, scaled = (torch.autograd.grad((times * y).sum(), inputs, retain_graph=True) for times in (1, 1, -1024))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(-1024 * a, b) for a, b in zip(once, scaled, strict=True))
