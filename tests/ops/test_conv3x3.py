"""The 3 x 3 convolution in fewer products against PyTorch's: values, gradients, layouts, operators, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from copgen_fast.ops import Conv3x3, backends, conv3x3, tiles, winograd
from copgen_fast.ops.conv3x3 import functional, operator

needs_tiles = pytest.mark.skipif(not tiles.built(), reason="the C++ extension is not built")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def drawn(*shape, seed=0, dtype=torch.float64, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype, memory_format=layout)


def with_gradients(convolve, x, weight, *more):
    inputs = [y.detach().requires_grad_() for y in (x, weight, *more)]
    out = convolve(*inputs)
    gradient = drawn(*out.shape, seed=9, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def as_written(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 5),
    sides=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    channels=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    biased=st.booleans(),
    least=st.sampled_from([1, 5000, 10**9]),
)
def test_values_and_gradients_are_pytorchs(n, sides, channels, layouts, biased, least):
    """Of any size, in any layout, with weights that are prepared in one part or in many."""
    x, weight = (
        drawn(n, channels[0], *sides, layout=layouts[0]),
        drawn(*channels[::-1], 3, 3, seed=1, layout=layouts[1]),
    )
    inputs = [x, weight, drawn(channels[1], seed=2)][: 2 + biased]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_PREPARED", least)
        found = with_gradients(lambda *given: conv3x3(*given, backend="cpp"), *inputs)
    for ours, expected in zip(found, with_gradients(as_written, *inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10, check_stride=False)


@needs_tiles
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted_are_computed(wanted, monkeypatch):
    computed, once = [], operator.fused_conv3x3_backward
    monkeypatch.setattr(operator, "fused_conv3x3_backward", lambda *args: computed.append(args[3:]) or once(*args))
    x, weight = drawn(2, 3, 5, 6), drawn(4, 3, 3, 3, seed=1)
    inputs = [y.requires_grad_(needed) for y, needed in zip((x, weight), wanted, strict=True)]
    out = conv3x3(*inputs, backend="cpp")
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.sum().backward()
        expected = [y.detach().clone().requires_grad_(needed) for y, needed in zip(inputs, wanted, strict=True)]
        as_written(*expected).sum().backward()
        assert computed == [wanted]
        for ours, theirs in zip(inputs, expected, strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@needs_tiles
@pytest.mark.parametrize(("n", "channels", "side"), [(40, 48, 12), (9, 300, 7)], ids=["many tiles", "many channels"])
def test_float32_is_the_same_by_any_number_of_threads_and_rounds_as_pytorchs(n, channels, side):
    x, weight = drawn(n, channels, side, side, layout=torch.channels_last), drawn(64, channels, 3, 3, seed=1)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 7, 40):
        torch.set_num_threads(threads)
        found.append(with_gradients(lambda *given: conv3x3(*given, backend="cpp"), x.float(), weight.float()))
    torch.set_num_threads(before)
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))
    theirs = with_gradients(as_written, x.float(), weight.float())
    exact = with_gradients(as_written, x.float().double(), weight.float().double())
    for ours, other, expected in zip(found[0], theirs, exact, strict=True):
        errors = [(y.double() - expected).norm() / expected.norm() for y in (ours, other)]
        assert errors[0] <= max(6 * errors[1], 1e-6)


@needs_tiles
def test_it_is_a_whole_operator_and_compiles():
    x, weight = (y.requires_grad_() for y in (drawn(2, 3, 5, 6), drawn(4, 3, 3, 3, seed=1)))
    torch.library.opcheck(operator.fused_conv3x3, (x, weight))
    torch.library.opcheck(operator.fused_conv3x3_backward, (drawn(2, 4, 5, 6), x.detach(), weight.detach(), True, True))
    torch.library.opcheck(
        operator.fused_conv3x3_backward, (drawn(2, 4, 5, 6), x.detach(), weight.detach(), False, True)
    )
    compiled = torch.compile(lambda *given: conv3x3(*given, backend="cpp"), backend="aot_eager", fullgraph=True)
    for ours, expected in zip(with_gradients(compiled, x, weight), with_gradients(as_written, x, weight), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@needs_tiles
def test_derivatives_of_gradients_are_pytorchs():
    x, weight = (y.requires_grad_() for y in (drawn(2, 3, 4, 5), drawn(2, 3, 3, 3, seed=1)))
    assert torch.autograd.gradgradcheck(lambda *given: conv3x3(*given, backend="cpp"), (x, weight))
    tangent = torch.func.jvp(lambda y: conv3x3(y, weight), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, as_written(torch.ones_like(x), weight))


def test_tiles_are_taken_where_they_are_faster(monkeypatch):
    taken = []
    fused = functional.fused_conv3x3
    monkeypatch.setattr(functional, "fused_conv3x3", lambda *given: taken.append(1) or fused(*given))

    def takes(n, channels, outputs, side, dtype=torch.float32):
        taken.clear()
        conv3x3(torch.zeros(n, channels, side, side, dtype=dtype), torch.zeros(outputs, channels, 3, 3, dtype=dtype))
        return bool(taken)

    assert takes(8, 32, 64, 8) == takes(8, 32, 64, 8, torch.float64) == tiles.built()
    assert not takes(8, 31, 64, 8) and not takes(8, 64, 31, 8), "few channels"
    assert not takes(7, 32, 32, 8), "a few tiles"
    assert not takes(99, 32, 32, 2), "tiles that images don't fill"
    assert not takes(8, 32, 32, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv3x3(torch.zeros(8, 32, 8, 8), torch.zeros(32, 32, 3, 3))
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("biased", [True, False])
def test_the_layer_is_nn_conv2d_with_its_parameters(biased):
    before = torch.get_rng_state()
    conv = nn.Conv2d(32, 33, 3, padding=1, bias=biased).double().eval()
    drawn_by_conv = torch.get_rng_state()
    layer = Conv3x3.of(conv)
    assert torch.equal(torch.get_rng_state(), drawn_by_conv) and not torch.equal(drawn_by_conv, before)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    assert layer.state_dict().keys() == conv.state_dict().keys()
    x = drawn(4, 32, 12, 12)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-10, atol=1e-10)
    assert Conv3x3(3, 4, biased).state_dict().keys() == conv.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same"},
    ],
    ids=str,
)
def test_other_convolutions_are_none_of_its(options):
    assert Conv3x3.of(nn.Conv2d(4, 4, **options)) is None


def test_what_cannot_be_convolved_is_refused():
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3)
    with pytest.raises(ValueError, match="weight"):
        conv3x3(x, torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match="x"):
        conv3x3(x[0], weight)
    with pytest.raises(ValueError, match="conv3x3 on cpu has no 'triton'"):
        conv3x3(x, weight, backend="triton")
    if tiles.built():
        with pytest.raises(TypeError, match="bfloat16"):
            conv3x3(x.bfloat16(), weight.bfloat16(), backend="cpp")
        with pytest.raises(TypeError, match="weight"):
            conv3x3(x, weight.double(), backend="cpp")


def test_backends_say_which_one_runs():
    assert backends()["conv3x3"] == {"cpu": "cpp" if tiles.built() else "reference", "cuda": "reference"}


@needs_tiles
@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), layout=st.sampled_from(LAYOUTS), turned=st.booleans())
def test_weights_are_prepared_as_by_pytorchs_operators(sizes, layout, turned):
    weight = drawn(*sizes, 3, 3, layout=layout)
    weight = weight.transpose(0, 1) if turned else weight
    torch.testing.assert_close(tiles.prepare(weight), winograd.prepare(weight), check_stride=False)
