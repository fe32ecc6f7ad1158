"""3 x 3 convolutions by other products: values and gradients are those of the convolution as it is written."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench.baselines import convolutions as baselines
from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.ops import winograd

METHODS = {
    "winograd": (convolutions.WINOGRAD, 1),
    "large tiles": (convolutions.LARGE_TILES, 1),
    "transposed": (convolutions.TRANSPOSED, 2),
    "differences": (convolutions.DIFFERENCES, 2),
    "tiled differences": (convolutions.TILED_DIFFERENCES, 2),
}
PEERS = {  # of the benchmarks
    "phases": (baselines.PHASES, 2),
    "shuffled": (baselines.SHUFFLED, 2),
    "pixel shuffle": (baselines.PIXEL_SHUFFLED, 2),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_written(x, weight, bias, scale):
    return F.conv2d(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), weight, bias, padding=1)


@pytest.mark.parametrize("name", METHODS | PEERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 4) for _ in range(3))),
    sides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    biased=st.booleans(),
)
def test_values_and_gradients_are_the_convolutions(name, layout, sizes, sides, biased):
    method, scale = (METHODS | PEERS)[name]
    n, channels, outputs = sizes
    unit = winograd.SIDE if name == "large tiles" else 2
    x = drawn(n, channels, unit * sides[0], unit * sides[1]).to(memory_format=layout).requires_grad_()
    weight, bias = drawn(outputs, channels, 3, 3, seed=1), drawn(outputs, seed=2) if biased else None
    found, expected = method.run(x, method.prepare(weight), bias), as_written(x, weight, bias, scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    direction = drawn(*expected.shape, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad(found, x, direction), torch.autograd.grad(expected, x, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_large_tiles_in_strips_round_like_a_convolution(monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 8)
    method, x, weight = convolutions.LARGE_TILES, drawn(2, 64, 16, 24), drawn(32, 64, 3, 3, seed=1)
    exact = as_written(x, weight, None, 1)
    x, weight = x.float().requires_grad_(), weight.float()
    direct, found = (way.run(x, way.prepare(weight), None) for way in (convolutions.DIRECT, method))
    errors = [(y.double() - exact).square().mean().sqrt() for y in (direct, found)]
    assert errors[1] <= 4 * errors[0]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (direct, found)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["large tiles", "tiled differences"])
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("channels", [3, 8, 130])
def test_bfloat16_takes_the_layouts_that_it_needs(monkeypatch, name, instructions, channels):
    """With and without the extension, and with more and fewer numbers in the weight than in the tiles."""
    if not instructions:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    method, scale = METHODS[name]
    x, weight, bias = drawn(2, channels, 8, 8), drawn(16, channels, 3, 3, seed=1) / channels, drawn(16, seed=2)
    gradient = drawn(2, 16, 8 * scale, 8 * scale, seed=3)
    x.requires_grad_()
    expected = as_written(x, weight, bias, scale)
    exact = [expected, *torch.autograd.grad(expected, x, gradient)]
    method, prepared = convolutions.in_bfloat16(method, method.prepare(weight.float()))
    half = x.detach().bfloat16().requires_grad_()
    found = method.run(half, prepared, bias.bfloat16())
    for ours, theirs in zip((found, *torch.autograd.grad(found, half, gradient.bfloat16())), exact, strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.double() - theirs).norm() <= 0.03 * theirs.norm()
    assert pickle.loads(pickle.dumps(method)) is method


@pytest.mark.parametrize("name", METHODS)
def test_no_images_are_no_images(name):
    method, scale = METHODS[name]
    x = drawn(0, 3, 4, 8).requires_grad_()
    found = method.run(x, method.prepare(drawn(2, 3, 3, 3)), drawn(2))
    assert found.shape == (0, 2, 4 * scale, 8 * scale)
    assert torch.autograd.grad(found.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("name", ["winograd", "large tiles", "differences", "tiled differences"])
def test_autocast_does_not_lower_a_gradients_precision(name):
    method, scale = METHODS[name]
    x, weight = drawn(2, 3, 4, 4).float().requires_grad_(), method.prepare(drawn(2, 3, 3, 3, seed=1).float())
    gradients = []
    for within in (False, True):
        found = method.run(x, weight, None).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            gradients += torch.autograd.grad(found, x)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", METHODS)
def test_others_may_write_into_the_result(name):
    method, scale = METHODS[name]
    x, weight = drawn(2, 3, 4, 4).requires_grad_(), drawn(2, 3, 3, 3, seed=1)
    found = method.run(x, method.prepare(weight), None)
    found += 0
    assert type(found.grad_fn).__name__ != "CopySlices", "its gradient is copied, as it was a view"
    parts = found.unflatten(3, (-1, 2))
    parts += 1
    expected = as_written(x, weight, None, scale) + 1
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, drawn(2, 3, 4, 4))
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


class RoundedScalars(TorchDispatchMode):
    """Tensors without dimensions take the dtype of what they multiply or divide first, as they do on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
            args = [x.to(args[0].dtype) if isinstance(x, torch.Tensor) and x.ndim == 0 else x for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["winograd", "differences"])
@pytest.mark.parametrize("size", [0, 1e-6, 1e-4, 2e4, 6e4])
def test_gradients_of_half_precision_keep_their_range(name, size):
    """As those of a scaled loss: small ones aren't lost, and none overflows that the convolution itself represents."""
    method, scale = METHODS[name]
    x = drawn(2, 16, 4, 4).half().requires_grad_()
    weight = drawn(8, 16, 3, 3, seed=1) / 100
    gradient = (size * drawn(2, 8, 4 * scale, 4 * scale, seed=3).clamp(-1, 1)).half()
    with RoundedScalars():
        found = torch.autograd.grad(method.run(x, method.prepare(weight).half(), None), x, gradient)[0]
    exact = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(as_written(exact, weight, None, scale), exact, gradient.double())[0]
    assert (found.double() - expected).norm() <= 1e-2 * expected.norm() + 3e-8 * expected.numel() ** 0.5


@pytest.mark.parametrize("name", ["winograd", "differences"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_is_still_seen(name, value):
    method, scale = METHODS[name]
    x = drawn(1, 2, 4, 4).half().requires_grad_()
    gradient = torch.full((1, 2, 4 * scale, 4 * scale), 1.0).half()
    gradient[0, 0, 1, 1] = value
    found = torch.autograd.grad(method.run(x, method.prepare(drawn(2, 2, 3, 3)).half(), None), x, gradient)[0]
    assert not found.isfinite().all()
