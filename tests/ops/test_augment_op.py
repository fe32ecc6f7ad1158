"""The operators of the augmentation: registration, compilation, memory, determinism."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.augmentations import POLICIES, get
from copgen_fast.ops import Augment, AugmentParams, augment
from copgen_fast.ops.augment.operator import FIELDS, fused_augment, fused_augment_backward, fused_filter
from copgen_fast.ops.backend import INSTALLED

pytestmark = pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")

STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.5}
EVERYTHING = replace(get("simclr"), **STRONG, jitter=0.9, solarize=0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(n, size, policy=EVERYTHING, views=1, out_size=None, seed=0):
    images = torch.rand(n, 3, *size, generator=seeded(seed), dtype=torch.float64)
    return images, AugmentParams.sample(n * views, size, policy, out_size=out_size, generator=seeded(seed + 1))


def arguments(images, params, out_size, out_dtype=torch.float32, channels_last=False, straight_through=False):
    tensors = [getattr(params, name) for name in FIELDS]
    statistics = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    return (images, *tensors, list(out_size), *statistics, out_dtype, channels_last, straight_through, "cpp", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_opcheck_augment(dtype, channels_last, views):
    images, params = drawn(3, (6, 7), views=views)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(dtype, memory_format=layout).requires_grad_()
    torch.library.opcheck(fused_augment, arguments(images, params, (5, 8), dtype, channels_last))


def test_cpp_takes_the_parameters_in_the_operators_order():
    for name, first in (("augment_forward", 1), ("augment_backward", 2)):
        schema = getattr(torch.ops.copgen_fast_cpp, name).default._schema
        assert tuple(x.name for x in schema.arguments[first : first + len(FIELDS)]) == FIELDS


def test_opcheck_backward_and_filter():
    images, params = drawn(3, (6, 7))
    views, pivot = fused_augment(*arguments(images, params, (5, 8)))
    tensors = [getattr(params, name) for name in FIELDS]
    torch.library.opcheck(fused_augment_backward, (views, images, *tensors, pivot, [0.2] * 3, False, "cpp"))
    weights = torch.rand(3, 5, generator=seeded())
    for transposed in (False, True):
        torch.library.opcheck(fused_filter, (images.requires_grad_(), weights, transposed, "cpp"))


@pytest.mark.parametrize("size", [(3, 3), (9, 4), (16, 40)])
@pytest.mark.parametrize("radius", [1, 2])
def test_the_transposed_filter_is_the_adjoint(size, radius):
    x, y = (torch.randn(2, 3, *size, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    # Not symmetric, so that a mirrored filter cannot pass.
    weights = torch.rand(2, 2 * radius + 1, generator=seeded(2))
    there = (fused_filter(x, weights, False, "cpp") * y).sum()
    back = (x * fused_filter(y, weights, True, "cpp")).sum()
    torch.testing.assert_close(there, back)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    out_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    n=st.integers(0, 4),
    views=st.integers(1, 3),
    blur=st.sampled_from([0.0, 0.5]),
    clamp=st.sampled_from(["exact", "straight_through"]),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(size, out_size, n, views, blur, clamp, seed):
    policy = replace(EVERYTHING, blur=blur if min(out_size) > 1 else 0.0)
    images, params = drawn(n, size, policy, views, out_size, seed)
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "out_dtype": torch.float64, "clamp": clamp}
    results = []
    for backend in ("cpp", "reference"):
        leaf = images.clone().requires_grad_()
        out = augment(leaf, params, out_size, backend=backend, **statistics)
        weights = torch.randn(out.shape, generator=seeded(seed), dtype=torch.float64)
        results.append((out.detach(), torch.autograd.grad(out, leaf, weights)[0]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


# RandAugment has a test of its own.
@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.rand_augment is None])
def test_compiles_to_one_graph(name):
    policy = get(name)
    images, params = drawn(4, (24, 24), policy)
    images = images.float().requires_grad_()

    def loss(images, params):
        return (
            augment(images, params, 20, mean=policy.mean, std=policy.std, memory_format=torch.channels_last) ** 2
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for run in (loss, compiled):
        images.grad = None
        value = run(images, params)
        value.backward()
        if run is loss:
            expected = value.detach(), images.grad
    torch.testing.assert_close((value.detach(), images.grad), expected)


def test_the_reference_compiles_to_one_graph_too():
    images, params = drawn(4, (10, 10), get("simclr"))
    run = torch.compile(lambda x, p: augment(x, p, 8, backend="reference"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(images, params), augment(images, params, 8, backend="reference"))


def test_a_compiled_graph_still_refuses_a_crop_outside():
    images, params = drawn(2, (10, 10), get("simclr"))
    params.crop[1, 0] = 9
    with pytest.raises(Exception, match=r"params: crop \[9, .*view 1 leaves the 10 x 10 image"):
        torch.compile(lambda x: augment(x, params, 8), backend="aot_eager")(images)


def test_backward_keeps_no_image_but_the_input():
    images, params = drawn(4, (32, 32))
    images = images.float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        augment(images, params, 32)
    large = [t for t in kept if t.numel() >= images[0, 0].numel()]
    assert len(large) == 1 and large[0].data_ptr() == images.data_ptr()


@pytest.mark.parametrize("policy", [EVERYTHING, replace(EVERYTHING, blur=0.5)])
def test_bits_depend_on_neither_run_nor_threads_nor_batch(policy):
    images, params = drawn(7, (33, 30), policy)
    images = images.float().requires_grad_()

    def run(rows=slice(None)):
        views = augment(images[rows], params[rows], 29)
        return views, torch.autograd.grad(views.square().sum(), images)[0][rows]

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(first, run(slice(2, 4)), strict=True):
        assert torch.equal(one[2:4], other)


def test_an_expanded_gradient():
    images, params = drawn(3, (9, 8))
    images = images.float().requires_grad_()
    views = augment(images, params, 7)
    (got,) = torch.autograd.grad(views.sum(), images, retain_graph=True)
    (want,) = torch.autograd.grad(views, images, torch.ones_like(views))
    assert torch.equal(got, want)


def test_a_negated_and_scaled_loss():
    images, params = drawn(3, (9, 8))
    images = images.float().requires_grad_()
    views = augment(images, params, 7)
    weights = torch.randn(views.shape, generator=seeded())
    plain, scaled = (torch.autograd.grad(views, images, s * weights, retain_graph=True)[0] for s in (1, -1024))
    assert torch.equal(-1024 * plain, scaled)


def test_images_without_gradient_get_none():
    images, params = drawn(2, (8, 8))
    assert not augment(images, params, 8).requires_grad
    module = Augment(get("simclr"), 8)
    assert not module((images * 255).byte()).requires_grad
