"""The conditional normalisation against its definition: values, gradients, memory, operators."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.ops import cond_norm
from copgen_fast.ops.backend import INSTALLED
from copgen_fast.ops.cond_norm.operator import fused_cond_norm, fused_cond_norm_, fused_cond_norm_backward
from tests.helpers.on_gpu import captured, needs_gpu

BACKENDS = [name for name in ("cpp", "reference") if name in INSTALLED]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
needs_cpp = pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(shape, dtype=torch.float64, layout=torch.contiguous_format, rows=None, seed=0):
    """x, scale and shift that are leaves."""
    x = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    rows = shape[0] if rows is None else rows
    affine = torch.randn(2, rows, shape[1], generator=seeded(seed + 1), dtype=torch.float64)
    return [y.requires_grad_() for y in (x.to(dtype, memory_format=layout), *affine)]


def exact(x, scale, shift, upsample=False):
    """The formula, in float64."""
    y = (x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]).clamp_min(0)
    return y.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else y


def with_gradients(run, inputs, upsample=False, seed=7):
    y = run(*inputs, upsample=upsample)
    weights = torch.randn(y.shape, generator=seeded(seed), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights.to(y.dtype))]


def assert_same(ours, theirs, **tolerance):
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, check_stride=False, **tolerance)


@each_backend
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from(LAYOUTS),
    upsample=st.booleans(),
    one_row=st.booleans(),
    seed=st.integers(0, 999),
)
def test_is_its_formula(backend, shape, layout, upsample, one_row, seed):
    inputs = drawn(shape, layout=layout, rows=1 if one_row else None, seed=seed)
    ours = with_gradients(lambda *a, **k: cond_norm(*a, backend=backend, **k), inputs, upsample)
    assert_same(ours, with_gradients(exact, inputs, upsample), rtol=1e-12, atol=1e-11)


@each_backend
@each_layout
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 97, 113), (1, 113, 3, 97), (3, 97, 1, 3), (1, 1, 113, 1)], ids=str
)
def test_odd_sizes(backend, layout, upsample, shape):
    inputs = drawn(shape, layout=layout)
    ours = with_gradients(lambda *a, **k: cond_norm(*a, backend=backend, **k), inputs, upsample)
    assert_same(ours, with_gradients(exact, inputs, upsample), rtol=1e-12, atol=1e-11)


@each_backend
@each_layout
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_errors_are_no_larger_than_pytorchs(backend, layout, upsample, dtype):
    """In each dtype, of what is computed in float64 from the same rounded x: at most twice those of PyTorch."""
    x, *affine = drawn((3, 48, 40, 40), dtype, layout)
    inputs = [x, *(y.detach().float().to(y.dtype).requires_grad_() for y in affine)]

    def plain(x, scale, shift, upsample):
        scale, shift = (y.to(x.dtype)[:, :, None, None] for y in (scale, shift))
        y = torch.addcmul(shift, x, scale).relu()
        return F.interpolate(y, scale_factor=2) if upsample else y

    ours = with_gradients(lambda *a, **k: cond_norm(*a, backend=backend, **k), inputs, upsample)
    assert [y.dtype for y in ours] == [dtype, dtype, torch.float64, torch.float64]
    theirs, wanted = with_gradients(plain, inputs, upsample), with_gradients(exact, inputs, upsample)
    for mine, peer, truth in zip(ours, theirs, wanted, strict=True):
        error, allowed = ((y.double() - truth.double()).norm() for y in (mine, peer))
        assert error <= 2 * allowed + 1e-12 * truth.norm()


@each_backend
@each_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_and_rounded_exactly(backend, layout, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(1, 64, 32, 32).to(memory_format=layout)
    one, zero = torch.ones(1, 64), torch.zeros(1, 64)
    torch.testing.assert_close(cond_norm(x, one, zero, backend=backend), x.relu(), rtol=0, atol=0, equal_nan=True)
    # Bits of float32 as they come, and what lies halfway between two halves, and next to that.
    bits = torch.randint(0, 2**31, (20_000,), generator=seeded(), dtype=torch.int64).to(torch.int32)
    between = (
        every[every >= 0].float().view(torch.int32)[:, None] + torch.tensor([0xFFF, 0x1000, 0x1001, 0x8000])
    ).flatten()
    scale = torch.cat([bits, between]).view(torch.float32)[None]
    y = cond_norm(torch.ones(1, scale.shape[1], 1, 1, dtype=dtype), scale, torch.zeros_like(scale), backend=backend)
    torch.testing.assert_close(y.flatten(), scale[0].to(dtype), rtol=0, atol=0, equal_nan=True)


@each_backend
def test_layouts_are_kept(backend):
    x, scale, shift = (y.detach() for y in drawn((2, 5, 6, 7)))
    arranged = {
        "NCHW": (x, torch.contiguous_format),
        "NHWC": (x.to(memory_format=torch.channels_last), torch.channels_last),
        "sliced": (x[:, :, ::2], torch.contiguous_format),
        "sliced NHWC": (x.to(memory_format=torch.channels_last)[:, :, 1:, ::2], torch.channels_last),
        "expanded": (x[:1].expand(2, -1, -1, -1), torch.contiguous_format),
        "transposed": (x.mT, torch.contiguous_format),
    }
    for name, (given_x, layout) in arranged.items():
        for upsample in (False, True):
            leaves = [y.clone() if y is not given_x else y.detach() for y in (given_x, scale, shift)]
            leaves = [y.requires_grad_() for y in leaves]
            y = cond_norm(*leaves, upsample=upsample, backend=backend)
            assert y.is_contiguous(memory_format=layout), name
            ours = with_gradients(lambda *a, **k: cond_norm(*a, backend=backend, **k), leaves, upsample)
            assert_same(ours, with_gradients(exact, leaves, upsample), rtol=1e-12, atol=1e-12)


@each_backend
def test_scales_may_be_parts_of_a_larger_tensor(backend):
    x, *_ = drawn((3, 6, 4, 4))
    together = torch.randn(3, 14, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    for scale, shift in (together[:, :12].chunk(2, 1), together[:, ::2][:, :6].chunk(1, 1) * 2):
        y = cond_norm(x, scale, shift, backend=backend)
        ours, theirs = (torch.autograd.grad(z.square().sum(), (x, together)) for z in (y, exact(x, scale, shift)))
        assert_same(ours, theirs, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("which", range(3), ids=["x", "scale", "shift"])
def test_each_gradient_alone(backend, which):
    inputs = [y.detach() for y in drawn((2, 4, 5, 3))]
    inputs[which].requires_grad_()
    ours, theirs = (
        torch.autograd.grad(run(*inputs).square().sum(), inputs[which])
        for run in (lambda *a: cond_norm(*a, backend=backend), exact)
    )
    assert_same(ours, theirs, rtol=1e-12, atol=1e-12)


@each_backend
@each_layout
def test_gradcheck(backend, layout):
    for upsample in (False, True):
        inputs = drawn((2, 3, 2, 3), layout=layout)

        def run(x, scale, shift, upsample=upsample):
            return cond_norm(x, scale, shift, upsample=upsample, backend=backend)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each_backend
@each_layout
def test_a_negated_and_scaled_loss(backend, layout):
    inputs = drawn((2, 5, 9, 8), torch.float32, layout)
    y = cond_norm(*inputs, backend=backend)
    weights = torch.randn(y.shape, generator=seeded())
    plain, scaled = (torch.autograd.grad(y, inputs, s * weights, retain_graph=True) for s in (1, -1024))
    assert_same([-1024 * grad for grad in plain], scaled, rtol=0, atol=0)


@each_backend
def test_a_gradient_without_strides(backend):
    inputs = drawn((2, 5, 4, 4))
    ours, theirs = (
        torch.autograd.grad(run(*inputs).sum(), inputs) for run in (lambda *a: cond_norm(*a, backend=backend), exact)
    )
    assert_same(ours, theirs, rtol=1e-12, atol=1e-12)


@each_backend
@each_layout
def test_nan_stays_and_zero_gets_no_gradient(backend, layout):
    x, scale, shift = (y.detach() for y in drawn((1, 3, 4, 5), torch.float32, layout))
    x[0, 1, 2, 3] = torch.nan
    x[0, 2] = shift[0, 2] = 0
    for upsample in (False, True):
        leaf = x.clone().requires_grad_()
        y = cond_norm(leaf, scale, shift, upsample=upsample, backend=backend)
        assert y.isnan().sum() == (4 if upsample else 1)
        affine = [z.clone().requires_grad_() for z in (scale, shift)]
        all_three = cond_norm(leaf, *affine, upsample=upsample, backend=backend)
        _, _, of_shift = grads = torch.autograd.grad(all_three, (leaf, *affine), torch.ones_like(y))
        assert of_shift[0, 2] == 0 and of_shift[0, 0] > 0
        for grad in (grads[0], *torch.autograd.grad(y, leaf, torch.ones_like(y))):
            assert not grad[0, 2].any() and grad[0, 1, 2, 3] == scale[0, 1].float() * (4 if upsample else 1)
    scale[0, 0] = torch.nan
    assert cond_norm(x, scale, shift, backend=backend)[0, 0].isnan().all()


@each_backend
@each_layout
def test_inplace_writes_into_x_where_nothing_needs_it(backend, layout):
    x, scale, shift = (y.detach() for y in drawn((2, 5, 6, 7), layout=layout))
    wanted, before = cond_norm(x, scale, shift, backend=backend), x.clone()
    kept = x.clone().requires_grad_()
    y = cond_norm(kept, scale, shift, inplace=True, backend=backend)
    assert torch.equal(kept, before) and torch.equal(y, wanted)
    sliced = x[:, :, ::2]
    assert torch.equal(cond_norm(sliced, scale, shift, inplace=True, backend=backend), wanted[:, :, ::2])
    assert torch.equal(x, before)
    y = cond_norm(x, scale, shift, inplace=True, backend=backend)
    assert torch.equal(y, wanted)
    assert backend == "reference" or y.data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert torch.equal(cond_norm(kept, scale, shift, inplace=True, backend=backend), wanted)


@needs_cpp
def test_overwriting_what_another_backward_needs_is_noticed():
    x, scale, shift = (y.detach() for y in drawn((2, 3, 4, 5), torch.float32))
    z = x * torch.ones_like(x, requires_grad=True)
    cond_norm(x, scale, shift, inplace=True, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    with torch.inference_mode():
        y = x.clone()
        assert cond_norm(y, scale, shift, inplace=True, backend="cpp") is y


@needs_cpp
@each_layout
def test_bits_depend_on_neither_run_nor_threads_nor_batch(layout):
    inputs = drawn((3, 20, 33, 30), torch.float32, layout)

    def run(rows=slice(None)):
        y = cond_norm(*(x[rows] for x in inputs))
        return [y, *(grad[rows] for grad in torch.autograd.grad(y.square().sum(), inputs))]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_same(run(), first, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    assert_same(run(slice(1, 2)), [y[1:2] for y in first], rtol=0, atol=0)


@needs_cpp
def test_the_backward_keeps_its_inputs_alone():
    inputs, kept = drawn((2, 4, 16, 16), torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cond_norm(*inputs)
    large = [t for t in kept if t.numel() >= inputs[0].numel()]
    assert len(large) == 1 and large[0].data_ptr() == inputs[0].data_ptr()
    assert cond_norm(*(x.detach() for x in inputs)).grad_fn is None


# Operators.


@needs_cpp
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("upsample", [False, True])
def test_opcheck(layout, dtype, upsample):
    x, *affine = drawn((2, 3, 4, 5), dtype, layout)
    affine = [y.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for y in affine]
    torch.library.opcheck(fused_cond_norm, (x, *affine, upsample, "cpp"))
    y = fused_cond_norm(x, *affine, upsample, "cpp").detach()
    plain = [z.detach() for z in (x, *affine)]
    for of_affine in (False, True):
        torch.library.opcheck(fused_cond_norm_backward, (y, *plain, upsample, of_affine, "cpp"))
    torch.library.opcheck(fused_cond_norm_, (*plain, "cpp"))


@each_backend
@each_layout
def test_compiles_to_one_graph(backend, layout):
    inputs = drawn((2, 5, 6, 7), torch.float32, layout)

    def loss(*inputs):
        return cond_norm(*inputs, upsample=True, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = ([run(*inputs), *torch.autograd.grad(run(*inputs), inputs)] for run in (compiled, loss))
    assert_same(ours, theirs)


@needs_cpp
def test_what_is_overwritten_compiles_too():
    inputs = [y.detach() for y in drawn((2, 5, 6, 7), torch.float32)]
    wanted = cond_norm(*inputs)
    compiled = torch.compile(lambda *a: cond_norm(*a, inplace=True) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), wanted + 1)


@needs_gpu
def test_a_cuda_graph_captures_both_directions():
    inputs = [y.detach().cuda().requires_grad_() for y in drawn((2, 48, 16, 16), torch.float32, torch.channels_last)]

    def run():
        y = cond_norm(*inputs, backend="triton")
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    graph, result = captured(run)
    graph.replay()
    assert_same(result, run())


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        (
            {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)},
            TypeError,
            "x: expected torch.float16 or .*got torch.int64",
        ),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x: expected shape \[N, C, H, W\], got \[2, 3, 4\]"),
        ({"scale": torch.zeros(2, 4)}, ValueError, r"scale: expected shape \[N, 3\], got \[2, 4\]"),
        ({"shift": torch.zeros(3, 3)}, ValueError, r"shift: expected shape \[2, 3\], got \[3, 3\]"),
        ({"shift": torch.zeros(3)}, ValueError, r"shift: expected shape \[N, 3\], got \[3\]"),
        ({"scale": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "scale: expected a floating-point tensor"),
        ({"scale": 1.0}, TypeError, "scale: expected a torch.Tensor, got float"),
        ({"scale": torch.zeros(2, 3, device="meta")}, ValueError, "scale: on meta, but x is on cpu"),
        ({"inplace": True, "upsample": True}, ValueError, "inplace: an upsampled result does not fit"),
        ({"backend": "cuda"}, ValueError, "backend: cond_norm on cpu has no 'cuda'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "scale": torch.zeros(2, 3), "shift": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        cond_norm(arguments.pop("x"), arguments.pop("scale"), arguments.pop("shift"), **arguments)
