"""The Triton kernels of the augmentation against the reference.

Images are tiny, as the interpreter takes some 0.1 s a view.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from copgen_fast.augmentations import get
from copgen_fast.ops import AugmentParams, augment
from copgen_fast.ops.augment import reference
from copgen_fast.ops.augment.operator import FIELDS, fused_filter
from tests.helpers.constant_images import assert_alike
from tests.helpers.on_gpu import captured, needs_gpu, no_waiting
from tests.helpers.triton_device import DEVICE

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ORDERS = list(itertools.permutations(range(4)))
EVERYTHING = dataclasses.replace(get("simclr"), jitter=1.0, gray=0.3, solarize=0.4)
# The interpreter cuts bfloat16 where a GPU rounds.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height, width, dtype=torch.float32, seed=0):
    images = torch.rand(n, 3, height, width, generator=seeded(seed), dtype=torch.float64)
    return ((images * 255).byte() if dtype == torch.uint8 else images.to(dtype)).to(DEVICE)


def drawn(n, size, policy=EVERYTHING, out_size=None, seed=0):
    return AugmentParams.sample(n, size, policy, out_size=out_size, generator=seeded(seed)).to(DEVICE)


def jittered(n, size, **changes):
    """Parameters that change nothing but go through the jitter, with `changes`."""
    params = AugmentParams.neutral(n, size, DEVICE)
    params.jitter[:] = True
    return dataclasses.replace(params, **{name: torch.tensor(value, device=DEVICE) for name, value in changes.items()})


def assert_same(images, params, out_size, **options):
    """Values and the gradient of a random functional are the reference's."""
    exact = images.dtype == torch.float64
    options = {"out_dtype": torch.float64 if exact else torch.float32, **IMAGENET, **options}
    leaf = images.detach().requires_grad_(images.is_floating_point())
    ours, theirs = (augment(leaf, params, out_size, backend=name, **options) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if exact else 1e-5)
    if leaf.requires_grad:
        weights = torch.randn(ours.shape, generator=seeded(5), dtype=torch.float64).to(ours)
        got, want = (torch.autograd.grad(x, leaf, weights)[0] for x in (ours, theirs))
        assert got.dtype == images.dtype
        assert (got.double() - want.double()).norm() <= RELATIVE[images.dtype] * want.double().norm()


@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_op_alone(op):
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(2, 1)
    factors[:, op] = torch.tensor((-0.1, 0.4) if op == 3 else (0.5, 1.4))
    assert_same(pictures(2, 7, 9), jittered(2, (7, 9), factors=factors.tolist()), (7, 9))


@pytest.mark.parametrize(("clamp", "step"), [("exact", 1), ("straight_through", 6)])
def test_orders(clamp, step):
    orders = ORDERS[::step]
    factors = 0.6 + 0.8 * torch.rand(len(orders), 4, generator=seeded(3)) - torch.tensor([0.0, 0, 0, 1])
    params = jittered(len(orders), (5, 4), order=orders, factors=factors.tolist())
    assert_same(pictures(len(orders), 5, 4, torch.float64), params, (5, 4), clamp=clamp)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    assert_same(pictures(2, 7, 6, dtype), drawn(2, (7, 6), seed=2), (8, 9))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_dtypes_down(dtype):
    assert_same(pictures(1, 7, 6, dtype), drawn(1, (7, 6), seed=2), (4, 3))


def test_two_views_of_each_image():
    assert_same(pictures(1, 6, 5, torch.float64), drawn(2, (6, 5)), (7, 6))
    assert_same(pictures(2, 3, 3, torch.float64), drawn(4, (3, 3)), (3, 3))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT,
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.expand(2, -1, -1, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 6, -1),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded-batch", "expanded-rows"],
)
def test_layouts_of_the_images(arrange):
    images = arrange(pictures(1, 6, 5))
    assert_same(images, drawn(len(images), tuple(images.shape[2:])), (6, 6))


def test_layouts_and_dtypes_of_the_views():
    images, params = pictures(1, 6, 5), drawn(1, (6, 5))
    plain = augment(images, params, 6, backend="triton")
    last = augment(images, params, 6, backend="triton", memory_format=torch.channels_last, out_dtype=torch.float16)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain.half())


@pytest.mark.parametrize(
    ("size", "out_size"),
    [
        ((1, 1), (3, 3)),
        ((3, 2), (1, 23)),
        ((97, 3), (3, 5)),
        ((3, 97), (2, 31)),
        ((3, 4), (1, 1)),
        ((19, 17), (17, 19)),
    ],
    ids=str,
)
def test_odd_sizes(size, out_size):
    assert_same(pictures(1, *size, torch.float64), drawn(1, size, seed=1), out_size)


@pytest.mark.parametrize(
    ("crop", "flip", "out_size"),
    [
        ((0, 0, 1, 1), True, (2, 3)),
        ((3, 2, 4, 7), False, (8, 11)),
        ((3, 2, 4, 7), True, (4, 5)),
        ((0, 1, 7, 1), True, (4, 2)),
    ],
    ids=str,
)
def test_crops_and_flips(crop, flip, out_size):
    params = jittered(1, (7, 9), crop=[crop], flip=[flip])
    assert_same(pictures(1, 7, 9, torch.float64), params, out_size)


def test_gray_and_solarize():
    changes = {"gray": [True, False, True], "solarize": [0.4, 0.6, math.inf]}
    assert_same(pictures(3, 4, 5, torch.float64), jittered(3, (4, 5), **changes), (4, 5))


def test_gray_pixels_have_no_hue_to_turn():
    images = pictures(1, 4, 4, torch.float64)[:, :1].expand(-1, 3, -1, -1)
    assert_same(images, jittered(1, (4, 4), factors=[[1.2, 1.0, 0.7, 0.1]]), (4, 4))


def test_constant_images_at_thresholds():
    assert_alike("triton", 8, 1, DEVICE)


def test_neutral_parameters_are_the_identity():
    images = torch.tensor([-0.5, 0.5, 1.5], device=DEVICE).repeat(1, 3, 4, 1).requires_grad_()
    out = augment(images, jittered(1, (4, 3)), (4, 3), backend="triton", check_range=False)
    assert torch.equal(out, images)
    assert torch.equal(torch.autograd.grad(out.sum(), images)[0], torch.ones_like(images))


def test_a_nan_stays_where_it_is_and_spreads_with_the_contrast():
    """It is in all channels wherever colours change; the reference's products, with zeros too, fill the view."""
    images = pictures(3, 4, 4)
    images[:, 1, 2, 1] = torch.nan
    params = jittered(3, (4, 4), factors=[[1.3, 1.0, 0.8, 0.2], [1.0, 0.5, 1.0, 0.0], [1.3, 1.0, 1.0, 0.0]])
    where, expected = (augment(images, params, (4, 4), backend=name).isnan() for name in ("triton", "reference"))
    assert where[0, :, 2, 1].all() and where[0].sum() == 3
    assert where[1].all() and expected.all()
    assert torch.equal(where[2], where[0])


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(n):
    images = pictures(n, 5, 6).requires_grad_()
    out = augment(images, drawn(n, (5, 6)), (4, 3), backend="triton")
    out.sum().backward()
    assert out.shape == (n, 3, 4, 3) and images.grad.shape == images.shape


def test_kernels_take_the_parameters_in_the_operators_order():
    from copgen_fast.kernels.color import Drawn

    assert Drawn._fields == FIELDS


def test_bad_rows_are_nan_and_have_no_gradient():
    # Below the public function, which refuses such rows on the CPU.
    from copgen_fast.kernels.augment import augment_backward, augment_forward

    crops = [(2, 0, 4, 5), (0, -1, 4, 4), (0, 0, 0, 5), (0, 2**62, 4, 2**62)]
    orders = [(0, 1, 1, 3), (0, 1, 2, 4)]
    images, params = pictures(7, 5, 5), jittered(7, (5, 5), factors=[[1.2, 0.7, 0.8, 0.2]] * 7)
    params.crop[1:5] = torch.tensor(crops)
    params.order[5:] = torch.tensor(orders)
    arguments = [getattr(params, name) for name in FIELDS]
    views, pivot, grad_images = torch.empty(7, 3, 4, 6, device=DEVICE), images.new_empty(7), torch.empty_like(images)
    std = [0.5] * 3
    augment_forward(images, *arguments, mean=std, std=std, views=views, pivot=pivot)
    assert views[0].isfinite().all() and views[1:].isnan().all() and pivot[0] > 0
    given = {"pivot": pivot, "std": std, "straight_through": False, "grad_images": grad_images}
    augment_backward(torch.ones_like(views), images, *arguments, **given)
    assert grad_images[0].any() and not grad_images[1:].any()


def test_two_runs_are_bit_equal():
    images, params = pictures(1, 6, 6).requires_grad_(), drawn(2, (6, 6))
    grads = []
    for _ in range(2):
        views = augment(images, params, 6, backend="triton")
        grads.append(torch.autograd.grad(views.square().sum(), images)[0])
    assert torch.equal(*grads)


def test_gradients_without_strides():
    images, params = pictures(1, 4, 5, torch.float64).requires_grad_(), drawn(1, (4, 5))
    ours, theirs = (
        torch.autograd.grad(augment(images, params, 4, backend=name).sum(), images)[0]
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clamp", ["exact", "straight_through"])
def test_gradcheck(clamp):
    # No clamp saturates, no channels tie: there it holds for both kinds.
    images = (0.3 + 0.4 * pictures(1, 2, 3, torch.float64)).requires_grad_()
    params = jittered(1, (2, 3), factors=[[1.1, 0.8, 1.2, 0.1]], order=[[2, 3, 1, 0]])

    def run(x):
        return augment(x, params, (3, 2), out_dtype=torch.float64, clamp=clamp, backend="triton", **IMAGENET)

    assert torch.autograd.gradcheck(run, images, fast_mode=True)


def test_more_programs_than_are_summed_at_once(monkeypatch):
    from copgen_fast.kernels import views as kernels

    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "PARTS", type(kernels.PARTS)(2))
    size = (20, 3) if DEVICE == "cpu" else (200, 200)
    params = jittered(1, size, factors=[[1.1, 0.6, 1.0, 0.1]])
    assert_same(pictures(1, *size, torch.float64), params, size)


def test_views_wider_than_a_tile():
    assert_same(pictures(1, 2, 130, torch.float64), drawn(1, (2, 130), seed=1), (3, 131))


# The filter.


@pytest.mark.parametrize(("size", "radius"), [((5, 7), 1), ((4, 9), 3), ((3, 3), 2)], ids=str)
def test_filter_and_its_adjoint(size, radius):
    x, y = (pictures(2, *size, torch.float64, seed) for seed in (0, 1))
    weights = torch.rand(2, 2 * radius + 1, generator=seeded()).to(DEVICE)
    filtered = fused_filter(x, weights, False, "triton")
    torch.testing.assert_close(filtered, reference.separable_filter(x, weights), rtol=0, atol=1e-12)
    back = fused_filter(y, weights, True, "triton")
    torch.testing.assert_close((filtered * y).sum(), (x * back).sum(), rtol=1e-12, atol=0)


def test_a_policy_with_blur():
    policy = dataclasses.replace(EVERYTHING, blur=1.0)
    assert_same(pictures(2, 7, 6), drawn(2, (7, 6), policy, out_size=(8, 8)), (8, 8))


# What only a GPU shows.


def _step(images, params):
    views = augment(images, params, 24, backend="triton", **IMAGENET)
    return torch.autograd.grad(views.square().sum(), images)[0]


@needs_gpu
def test_nothing_waits_for_the_device():
    images, params = pictures(4, 32, 32).requires_grad_(), drawn(8, (32, 32))
    _step(images, params)
    with no_waiting():
        _step(images, params)


@needs_gpu
def test_a_cuda_graph_replays_it():
    images, params = pictures(4, 32, 32).requires_grad_(), drawn(8, (32, 32))
    graph, result = captured(lambda: _step(images, params))
    with torch.no_grad():
        images.copy_(pictures(4, 32, 32, seed=9))
    graph.replay()
    assert torch.equal(result, _step(images, params))
