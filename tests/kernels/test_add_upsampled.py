"""The Triton kernels of the addition of an upsampled tensor against the reference."""

import pytest
import torch

from bench.counting import as_on_gpu
from copgen_fast.generators._convolutions import POINTWISE
from copgen_fast.generators._folding import FoldedConv, conv_add_upsampled
from copgen_fast.generators._spectral import SpectralConv2d
from copgen_fast.ops import add_upsampled
from copgen_fast.ops.add_upsampled.operator import fused_add_upsampled, fused_add_upsampled_, fused_sum_by_four
from tests.helpers.triton_device import DEVICE

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# The interpreter cuts bfloat16 where a GPU rounds.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])


def drawn(shape, dtype=torch.float64, layout=torch.contiguous_format):
    """x, small of this shape, and bias that are leaves."""
    n, channels, height, width = shape
    random = torch.Generator().manual_seed(0)
    x, small = (
        torch.randn(size, generator=random, dtype=torch.float64).to(DEVICE, dtype, memory_format=layout)
        for size in ((n, channels, 2 * height, 2 * width), shape)
    )
    bias = torch.randn(channels, generator=random, dtype=torch.float64).to(DEVICE, dtype)
    return [y.requires_grad_() for y in (x, small, bias)]


def assert_same(inputs, inplace=False):
    """Values and gradients are the reference's."""
    found = []
    for backend in ("triton", "reference"):
        given = inputs[0].clone()
        y = add_upsampled(given, *inputs[1:], inplace=inplace, backend=backend)
        assert (y.data_ptr() == given.data_ptr()) == inplace or not y.numel()
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        found.append([y.detach(), *torch.autograd.grad(y, inputs, weights)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        assert error <= RELATIVE[inputs[0].dtype] * theirs.double().norm()


@each_layout
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 97, 3, 1), (1, 3, 9, 113), (0, 3, 2, 2)], ids=str)
def test_odd_sizes(layout, shape):
    assert_same(drawn(shape, layout=layout), inplace=True)


@each_layout
@pytest.mark.parametrize("dtype", RELATIVE)
def test_dtypes(layout, dtype):
    assert_same(drawn((2, 16, 4, 3), dtype, layout))


@each_layout
def test_slices(layout):
    """Some channels of a wider small, every other number of a bias, and what lies apart is overwritten nevertheless."""
    x, small, bias = (y.detach() for y in drawn((2, 12, 4, 3), layout=layout))
    slices = [x[:, :4], small[:, 3:7], bias[1:9:2]]
    wanted = add_upsampled(*slices, backend="reference")
    torch.testing.assert_close(add_upsampled(*slices, backend="triton"), wanted)
    assert torch.equal(add_upsampled(*slices, inplace=True, backend="triton"), wanted) and torch.equal(x[:, :4], wanted)


def test_operators():
    x, small, bias = drawn((2, 3, 2, 3), torch.float32, torch.channels_last)
    torch.library.opcheck(fused_add_upsampled, (x, small, bias, "triton"))
    torch.library.opcheck(fused_sum_by_four, (x.detach(), "triton"))
    torch.library.opcheck(fused_add_upsampled_, (x.detach().clone(), small.detach(), None, "triton"))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph_and_has_second_derivatives(inplace):
    inputs = drawn((1, 2, 1, 2))

    def run(x, *others):
        return add_upsampled(x * 1, *others, inplace=inplace, backend="triton").sin()

    compiled = torch.compile(lambda *a: run(*a).sum(), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_block_ends_the_same_where_its_bias_is_added_with_its_shortcut():
    x, small, bias = (y.detach() for y in drawn((2, 5, 2, 3), torch.float32, torch.channels_last))
    conv = FoldedConv(SpectralConv2d(5, 5, 1), POINTWISE, True, bias).to(DEVICE)
    wanted = conv(x) + torch.nn.functional.interpolate(small, scale_factor=2)
    torch.testing.assert_close(conv(x, False), conv(x) - bias[:, None, None])
    torch.testing.assert_close(conv_add_upsampled(conv, x, small), wanted)
    with as_on_gpu():
        torch.testing.assert_close(conv_add_upsampled(conv, x, small), wanted)
