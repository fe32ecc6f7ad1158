"""The addition of an upsampled tensor against its definition: values, gradients, memory, operators."""

import pytest
import torch
import torch.nn.functional as F

from copgen_fast.ops import add_upsampled
from tests.helpers.on_gpu import captured, needs_gpu

each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


def drawn(dtype=torch.float64, layout=torch.contiguous_format, n=2, channels=3, height=4, width=5):
    """x, small and bias that are leaves."""
    random = torch.Generator().manual_seed(0)
    shapes = (n, channels, 2 * height, 2 * width), (n, channels, height, width)
    images = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    bias = torch.randn(channels, generator=random, dtype=torch.float64)
    return [y.requires_grad_() for y in (*(x.to(dtype, memory_format=layout) for x in images), bias.to(dtype))]


def exact(x, small, bias):
    return x.double() + F.interpolate(small.double(), scale_factor=2) + bias.double()[:, None, None]


@each_layout
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_its_formula_rounded_once(layout, inplace, dtype):
    inputs = drawn(dtype, layout)
    given = inputs[0].clone()
    y = add_upsampled(given, *inputs[1:], inplace=inplace)
    torch.testing.assert_close(y, exact(*inputs).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert y.is_contiguous(memory_format=layout) and (y.data_ptr() == given.data_ptr()) == inplace
    assert "CopySlices" not in type(y.grad_fn).__name__, "x's whole gradient would be copied twice"
    weights = torch.linspace(0, 1, y.numel()).view(y.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(z, inputs, weights.to(z.dtype)) for z in (y, exact(*inputs)))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, check_stride=False, rtol=4 * torch.finfo(dtype).eps, atol=0)
    without = add_upsampled(inputs[0].detach().clone(), inputs[1].detach(), inplace=inplace)
    assert torch.equal(without, add_upsampled(*(z.detach() for z in inputs[:2]), torch.zeros(3)))


def test_both_derivatives_of_what_is_overwritten():
    inputs = drawn(n=1, channels=2, height=1, width=2)

    def run(x, small, bias):
        return add_upsampled(x.clone(), small, bias, inplace=True).sin()

    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


def test_slices_are_taken_and_overwritten():
    x, small, bias = (y.detach() for y in drawn(channels=4, height=2))
    wide = torch.zeros(2, 4, 8, 10, dtype=torch.float64)
    wide[:, :, ::2] = x
    y = add_upsampled(wide[:, :2, ::2], small[:, 2:], bias[::2], inplace=True)
    torch.testing.assert_close(y, exact(x[:, :2], small[:, 2:], bias[::2]))
    assert torch.equal(wide[:, :2, ::2], y) and not wide[:, :, 1::2].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(inplace):
    inputs = drawn(torch.float32, torch.channels_last)

    def loss(x, *others):
        return add_upsampled(x * 1, *others, inplace=inplace).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(run(*inputs), inputs) for run in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


@needs_gpu
def test_a_cuda_graph_captures_both_directions():
    inputs = [y.detach().cuda().requires_grad_() for y in drawn(torch.float16, torch.channels_last, channels=48)]

    def run():
        y = add_upsampled(inputs[0] * 1, *inputs[1:], inplace=True, backend="triton")
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    graph, result = captured(run)
    graph.replay()
    for ours, theirs in zip(result, run(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, 4)}, ValueError, "x: expected an even height and width, got 5 x 4"),
        ({"x": torch.zeros(2, 3, 4, 4).long()}, TypeError, "x: expected torch.float16 or .*got torch.int64"),
        ({"small": torch.zeros(2, 3, 2, 3)}, ValueError, r"small: expected shape \[2, 3, 2, 2\], got \[2, 3, 2, 3\]"),
        ({"small": torch.zeros(2, 3, 2, 2).half()}, TypeError, "small: expected torch.float32, got torch.float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[3\], got \[4\]"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias: on meta, but x is on cpu"),
        ({"backend": "cpp"}, ValueError, "backend: add_upsampled on cpu has no 'cpp'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        add_upsampled(**{"x": torch.zeros(2, 3, 4, 4), "small": torch.zeros(2, 3, 2, 2)} | change)
