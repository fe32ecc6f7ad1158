"""3 x 3 convolutions in fewer products: their values, gradients and rounding, with and without the C++ extension."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from copgen_fast.ops import tiles, winograd

needs_cpp = pytest.mark.skipif(not tiles.compiled(torch.empty(0)), reason="the C++ extension is not built")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(x, weight, bias=None):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)


@needs_cpp
@pytest.mark.parametrize("tiles", [1, 5, 10**9])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 5, 17), (5, 7, 14, 40), (2, 12, 8, 16), (7, 4, 4, 33)])
def test_images_of_any_size_in_any_strips(monkeypatch, tiles, shape):
    monkeypatch.setattr(winograd, "TILES", tiles)
    x, weight, bias = drawn(*shape), drawn(19, shape[3], 3, 3, seed=1), drawn(19, seed=2)
    prepared, expected = winograd.prepare(weight), direct(x, weight, bias)
    torch.testing.assert_close(winograd.convolve(x, prepared, bias), expected, rtol=1e-10, atol=1e-10)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(winograd.convolve(turned, prepared, bias), expected, rtol=1e-10, atol=1e-10)
    added = drawn(*shape[:3], 19, seed=4)
    torch.testing.assert_close(
        winograd.convolve(x, prepared, bias, added, relu=True), (expected + added).relu(), rtol=1e-10, atol=1e-10
    )
    turned = added.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(
        winograd.convolve(x, prepared, None, turned), expected - bias + added, rtol=1e-10, atol=1e-10
    )
    gradient = drawn(*shape[:3], 19, seed=3)
    flipped = weight.transpose(0, 1).flip(2, 3)
    torch.testing.assert_close(winograd.adjoint(gradient, prepared), direct(gradient, flipped), rtol=1e-10, atol=1e-10)


@needs_cpp
def test_styles_and_what_follows_are_those_without_the_extension(monkeypatch):
    x, prepared, styles = drawn(3, 8, 12, 6), winograd.prepare(drawn(5, 6, 3, 3, seed=1)), drawn(3, 6, seed=2)
    shift = drawn(3, 8, 12, 5, seed=3)

    def finish(values, out, images, rows):
        torch.add(values, shift[images, rows], out=out)

    monkeypatch.setattr(winograd, "TILES", 3)
    found = winograd.styled(x, prepared, styles, finish)
    monkeypatch.setattr(tiles, "compiled", lambda x: False)
    torch.testing.assert_close(found, winograd.styled(x, prepared, styles, finish), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cpp", [pytest.param(True, marks=needs_cpp), False])
def test_rounding_is_about_twice_a_convolutions(monkeypatch, cpp):
    monkeypatch.setattr(tiles, "compiled", lambda x: cpp)
    x, weight = drawn(4, 16, 16, 64), drawn(64, 64, 3, 3, seed=1)
    exact, x, weight = direct(x, weight), x.float(), weight.float()
    ours, theirs = winograd.convolve(x, winograd.prepare(weight), None), direct(x, weight)
    assert (ours.double() - exact).norm() <= 4 * (theirs.double() - exact).norm()


@needs_cpp
@pytest.mark.parametrize("shape", [(3, 3, 5, 17), (4, 16, 16, 64)])
def test_bfloat16_rounds_what_is_multiplied_and_the_products(shape):
    x, weight, bias = drawn(*shape), drawn(64, shape[3], 3, 3, seed=1), drawn(64, seed=2)
    half = winograd.convolve(x.bfloat16(), tiles.pairs(winograd.prepare(weight)).bfloat16(), bias.bfloat16())
    exact = direct(x, weight, bias)
    assert half.dtype == torch.bfloat16 and (half.double() - exact).norm() <= 0.016 * exact.norm()


@needs_cpp
def test_results_are_the_same_in_every_run_and_by_any_number_of_threads():
    x, prepared = drawn(2, 20, 24, 64).float(), winograd.prepare(drawn(192, 64, 3, 3, seed=1).float())
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7, 64, 1):  # 64: more than there are tiles
        torch.set_num_threads(threads)
        found.append(winograd.convolve(x, prepared, None))
    torch.set_num_threads(before)
    assert all(found[0].equal(other) for other in found[1:])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one(dtype):
    x = torch.zeros(1, 8, 8, 3, dtype=dtype)
    x[0, 0, 0, 1] = torch.nan
    prepared = winograd.prepare(drawn(2, 3, 3, 3).float())
    prepared = prepared if dtype == torch.float32 else tiles.pairs(prepared).bfloat16()
    found = winograd.convolve(x, prepared, None, relu=True)
    assert found[0, :2, :2].isnan().all() and found[0, 5:, 5:].isfinite().all()


@needs_cpp
def test_shapes_are_known_without_values():
    with FakeTensorMode():
        assert winograd.convolve(torch.empty(2, 7, 5, 4), torch.empty(36, 4, 3), None).shape == (2, 7, 5, 3)
