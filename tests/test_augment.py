"""`augment` against torchvision's float-tensor path, image by image, in values and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import _functional_tensor as tv_tensor
from torchvision.transforms import functional as tv

from copgen_fast.augmentations import get
from copgen_fast.ops import Augment, AugmentParams, AugmentPolicy, augment

ORDERS = list(itertools.permutations(range(4)))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TOLERANCE = {torch.float32: {"rtol": 0, "atol": 1e-5}, torch.float64: {"rtol": 0, "atol": 1e-12}}
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height, width, dtype=torch.float32, seed=0):
    return torch.rand(n, 3, height, width, generator=seeded(seed), dtype=torch.float64).to(dtype)


def neutral(n, height, width):
    """Parameters that change nothing."""
    params = AugmentParams.neutral(n, (height, width))
    params.jitter[:] = True
    return params


def tv_hue(image, shift):
    # adjust_hue without its detour through float32.
    h, s, v = tv_tensor._rgb2hsv(image).unbind(-3)
    return tv_tensor._hsv2rgb(torch.stack(((h + shift) % 1.0, s, v), -3))


TV_OPS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv_hue)


def tv_augment(images, params, out_size, mean=None, std=None):
    """The pipeline out of torchvision's functions, one image at a time."""
    out = []
    for i, x in enumerate(images):
        if x.dtype == torch.uint8:
            x = x.float() / 255
        x = tv.resized_crop(x, *params.crop[i].tolist(), out_size, InterpolationMode.BILINEAR, antialias=True)
        x = tv.hflip(x) if params.flip[i] else x
        if params.jitter[i]:
            for op in params.order[i].tolist():
                x = TV_OPS[op](x, params.factors[i, op].item())
        x = tv.rgb_to_grayscale(x, 3) if params.gray[i] else x
        out.append(x if mean is None else tv.normalize(x, mean, std))
    return torch.stack(out)


def assert_same(images, params, out_size, **statistics):
    """Values within the tolerance of the dtype; the gradient of a random functional too, where there is one."""
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    leaf = images.clone().requires_grad_(images.dtype != torch.uint8)
    ours = augment(leaf, params, out_size, out_dtype=dtype, **statistics)
    theirs = tv_augment(leaf, params, out_size, **statistics)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    if leaf.requires_grad:
        weights = torch.randn(ours.shape, generator=seeded(5), dtype=dtype)
        got, want = (torch.autograd.grad(x, leaf, weights)[0] for x in (ours, theirs))
        assert (got - want).norm() <= RELATIVE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_op_alone(op, dtype):
    values = (-0.5, -0.1, 0.07, 0.33, 0.5) if op == 3 else (0.0, 0.6, 0.9, 1.1, 1.4)
    params = neutral(5, 7, 9)
    params.factors[:, op] = torch.tensor(values)
    assert_same(pictures(5, 7, 9, dtype), params, (7, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_orders(dtype):
    n = len(ORDERS)
    params = AugmentParams.sample(n, (8, 8), AugmentPolicy(brightness=0.6, contrast=0.6, saturation=0.6, hue=0.2))
    params = AugmentParams(
        crop=params.crop,
        flip=params.flip,
        order=torch.tensor(ORDERS),
        factors=0.6 + 0.8 * torch.rand(n, 4, generator=seeded(3)) - torch.tensor([0.0, 0, 0, 1]),
        jitter=torch.ones(n, dtype=torch.bool),
        gray=params.gray,
        blur=params.blur,
        solarize=params.solarize,
    )
    assert_same(pictures(n, 8, 8, dtype), params, (8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("out_size", [(16, 16), (5, 23), (33, 7), (1, 1)])
def test_the_whole_pipeline(dtype, out_size):
    images = pictures(24, 19, 14)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    params = AugmentParams.sample(24, (19, 14), get("simclr"), generator=seeded(1))
    assert_same(images, params, out_size, **IMAGENET)


@pytest.mark.parametrize("crop", [(0, 0, 1, 1), (3, 2, 4, 9), (0, 0, 17, 13), (16, 12, 1, 1), (2, 0, 15, 3)])
@pytest.mark.parametrize("out_size", [(3, 5), (17, 13), (40, 31)])
def test_crops_up_and_down(crop, out_size):
    params = neutral(2, 17, 13)
    params.crop[:] = torch.tensor(crop)
    params.flip[1] = True
    assert_same(pictures(2, 17, 13, torch.float64), params, out_size)


@settings(deadline=None, max_examples=30)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    # PyTorch 2.14.1's antialiased interpolate repeats the first row where the result is one pixel wide.
    out_size=st.tuples(st.integers(1, 20), st.integers(2, 20)),
    seed=st.integers(0, 999),
)
def test_any_sizes(size, out_size, seed):
    params = AugmentParams.sample(3, size, get("simclr"), generator=seeded(seed))
    images = pictures(3, *size, torch.float64, seed)
    ours = augment(images, params, out_size, out_dtype=torch.float64)
    torch.testing.assert_close(ours, tv_augment(images, params, out_size), rtol=0, atol=1e-12)


def test_one_pixel_wide_results_are_the_transpose_of_one_pixel_high_ones():
    images, params = pictures(2, 6, 9, torch.float64), neutral(2, 6, 9)
    params.crop[1] = torch.tensor([1, 2, 4, 5])
    turned = neutral(2, 9, 6)
    turned.crop[1] = torch.tensor([2, 1, 5, 4])
    wide = augment(images.mT, turned, (1, 7), out_dtype=torch.float64)
    torch.testing.assert_close(augment(images, params, (7, 1), out_dtype=torch.float64), wide.mT)


def test_neutral_parameters_are_the_identity_in_value_and_gradient():
    # Tied and saturated channels included: a neutral factor must not even clamp.
    images = torch.tensor([0.0, 0.5, 1.0]).repeat(2, 3, 4, 1).requires_grad_()
    out = augment(images, neutral(2, 4, 3), (4, 3))
    weights = torch.randn(out.shape, generator=seeded())
    assert torch.equal(out, images) and torch.equal(torch.autograd.grad(out, images, weights)[0], weights)


def test_gray_pixels_take_torchvisions_gradient():
    params = neutral(1, 4, 4)
    params.factors[:, 3] = 0.1
    assert_same(pictures(1, 4, 4, torch.float64)[:, :1].expand(-1, 3, -1, -1), params, (4, 4))


@pytest.mark.parametrize("clamp", ["exact", "straight_through"])
def test_gradcheck(clamp):
    # Kinks (clamps that saturate, channels that tie) are measure zero; straight-through needs none to saturate.
    images = (0.3 + 0.4 * pictures(3, 4, 5, torch.float64)).requires_grad_()
    params = AugmentParams.sample(3, (4, 5), get("simclr"), generator=seeded(3))
    params.factors[:, :3] = params.factors[:, :3].clamp(0.9, 1.1)

    def run(x):
        return augment(x, params, (3, 6), out_dtype=torch.float64, clamp=clamp, **IMAGENET)

    assert torch.autograd.gradcheck(run, images)


def test_straight_through_keeps_the_values_and_lets_the_gradient_pass():
    images = pictures(4, 6, 6).requires_grad_()
    params = neutral(4, 6, 6)
    params.factors[:, 0] = 3.0
    exact, through = (augment(images, params, 6, clamp=clamp) for clamp in ("exact", "straight_through"))
    assert torch.equal(exact, through) and (exact == 1).any()
    blocked, passed = (torch.autograd.grad(x.sum(), images)[0] for x in (exact, through))
    torch.testing.assert_close(passed, torch.full_like(images, 3.0))
    torch.testing.assert_close(blocked, 3.0 * (images.detach() * 3 <= 1))


def test_an_image_does_not_depend_on_its_neighbours():
    images = pictures(6, 9, 9)
    params = AugmentParams.sample(6, (9, 9), get("simclr"), generator=seeded(2))
    together = augment(images, params, 8)
    alone = [augment(images[i : i + 1], params[i : i + 1], 8) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(n):
    images = pictures(n, 5, 6).requires_grad_()
    out = Augment(get("simclr"), (4, 3))(images, generator=seeded())
    out.sum().backward()
    assert out.shape == (n, 3, 4, 3) and images.grad.shape == images.shape


def test_memory_formats_and_dtypes():
    images = pictures(4, 8, 6)
    params = AugmentParams.sample(4, (8, 6), get("simclr"), generator=seeded())
    plain = augment(images, params, 8)
    last = augment(images.contiguous(memory_format=torch.channels_last), params, 8, memory_format=torch.channels_last)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    half = augment(images, params, 8, out_dtype=torch.bfloat16)
    assert torch.equal(half, plain.bfloat16())
    assert augment(images.half(), params, 8).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, params, 8), plain)


def test_two_runs_are_bit_equal():
    images = pictures(8, 12, 12).requires_grad_()
    params = AugmentParams.sample(8, (12, 12), get("simclr"), generator=seeded())
    grads = [torch.autograd.grad(augment(images, params, 10).square().sum(), images)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_the_module_draws_applies_and_normalises():
    policy, images = get("simclr"), pictures(5, 12, 10)
    params = AugmentParams.sample(5, (12, 10), policy, generator=seeded(7))
    expected = augment(images, params, 8, **IMAGENET)
    module = Augment(policy, 8)
    assert torch.equal(module(images, generator=seeded(7)), expected)
    assert torch.equal(module(images, params), expected)
    assert "out_size=(8, 8)" in repr(module)


# Drawing parameters.


def assert_equal_params(one, other):
    for name in ("crop", "flip", "order", "factors", "jitter", "gray"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_sampling_replays_from_the_generator():
    def draw(seed):
        return AugmentParams.sample(9, (32, 24), get("simclr"), generator=seeded(seed))

    assert_equal_params(draw(1), draw(1))
    assert not torch.equal(draw(1).crop, draw(2).crop)
    torch.manual_seed(3)
    first = AugmentParams.sample(9, (32, 24), get("simclr"))
    torch.manual_seed(3)
    assert_equal_params(first, AugmentParams.sample(9, (32, 24), get("simclr")))


def test_policies_share_the_draws_they_have_in_common():
    simclr, plain = (
        AugmentParams.sample(64, (32, 32), get(name), generator=seeded()) for name in ("simclr", "no-color")
    )
    assert torch.equal(simclr.crop, plain.crop) and torch.equal(simclr.flip, plain.flip)
    assert not plain.jitter.any() and not plain.gray.any()


def test_crops_follow_torchvisions_distribution():
    crop = AugmentParams.sample(20000, (128, 128), get("simclr"), generator=seeded()).crop
    top, left, height, width = crop.double().unbind(1)
    area, ratio = height * width / 128**2, width / height
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 128).all() and (left + width <= 128).all()
    # Sides are rounded to pixels, hence the margins.
    assert 0.19 < area.min() and area.max() <= 1 and 0.735 < ratio.min() and ratio.max() < 1.36
    assert area.mean().item() == pytest.approx(0.542, abs=0.006)
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.006)
    # Uniform over the places where the crop fits: the offset's mean share is a half.
    room = height < 128
    assert (top[room] / (128 - height[room])).mean().item() == pytest.approx(0.5, abs=0.01)
    assert ((top == 0) & room).any() and ((top + height == 128) & room).any()


@pytest.mark.parametrize(
    ("size", "crop"), [((100, 10), (43, 0, 13, 10)), ((10, 100), (0, 43, 10, 13)), ((64, 64), (0, 0, 64, 64))]
)
def test_a_crop_that_never_fits_falls_back_to_the_centre(size, crop):
    # Ratios that no box of this area can have inside the image, except for the square one.
    policy = AugmentPolicy(crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3) if size[0] != size[1] else (1.0, 1.0))
    assert AugmentParams.sample(50, size, policy, generator=seeded()).crop.unique(dim=0).tolist() == [list(crop)]


def test_without_a_crop_scale_the_image_is_kept():
    assert AugmentParams.sample(3, (7, 5), get("no-crop")).crop.tolist() == [[0, 0, 7, 5]] * 3


def test_probabilities_factors_and_orders():
    n, policy = 24000, get("simclr")
    params = AugmentParams.sample(n, (32, 32), policy, generator=seeded())
    for name in ("flip", "jitter", "gray"):
        p = getattr(policy, name)
        assert getattr(params, name).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    for column, (low, high) in zip(params.factors.unbind(1), [(0.6, 1.4)] * 3 + [(-0.1, 0.1)], strict=True):
        assert low <= column.min() < column.max() <= high + 1e-6
        assert column.mean().item() == pytest.approx((low + high) / 2, abs=(high - low) * 0.01)
        assert column.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.02)
    orders, counts = params.order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == ORDERS
    # 1000 expected of each; five standard deviations.
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_a_strength_above_one_stops_at_factor_zero():
    factors = AugmentParams.sample(2000, (4, 4), AugmentPolicy(brightness=2.0, jitter=1.0), generator=seeded()).factors
    assert 0 <= factors[:, 0].min() < 0.01 and 2.98 < factors[:, 0].max() <= 3
    assert (factors[:, 1:] == torch.tensor([1.0, 1.0, 0.0])).all()


def test_params_slice_join_and_move():
    params = AugmentParams.sample(6, (8, 8), get("simclr"), generator=seeded())
    assert len(params) == 6 and len(params[1:3]) == 2
    assert_equal_params(AugmentParams.cat([params[:2], params[2:]]), params)
    assert params.to("meta").crop.device.type == "meta"


# Errors.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.2)),
        ("crop_scale", (0.2, 1.5)),
        ("crop_ratio", (0.0, 1.0)),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("gray", math.nan),
        ("brightness", -1.0),
        ("hue", 0.6),
        ("mean", (0.5,)),
        ("std", (0.5, 0.5, 0.0)),
    ],
)
def test_a_policy_names_its_bad_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}:"):
        AugmentPolicy(**{field: value})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1.0]}, TypeError, "images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, TypeError, "images"),
        ({"images": torch.zeros(2, 1, 8, 8)}, ValueError, "images"),
        ({"images": torch.zeros(3, 3, 8, 8)}, ValueError, "params: 2 rows for 3 images"),
        ({"images": torch.zeros(2, 3, 8, 7)}, ValueError, r"params: crop \[0, 0, 8, 8\].*view 0.*8 x 7"),
        ({"images": torch.zeros(2, 3, 8, 8, device="meta")}, ValueError, "params: on cpu"),
        ({"out_size": 0}, ValueError, "out_size"),
        ({"out_size": (4, 4, 4)}, ValueError, "out_size"),
        ({"out_size": 4.0}, ValueError, "out_size"),
        ({"mean": (0.0, 0.0, 0.0)}, ValueError, "mean and std"),
        ({"mean": (0.0, 0.0), "std": (1.0, 1.0, 1.0)}, ValueError, "mean"),
        ({"out_dtype": torch.uint8}, TypeError, "out_dtype"),
        ({"clamp": "soft"}, ValueError, "clamp: expected one of exact, straight_through, got 'soft'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"images": pictures(2, 8, 8), "params": neutral(2, 8, 8), "out_size": 8} | change
    with pytest.raises(error, match=message):
        augment(arguments.pop("images"), arguments.pop("params"), arguments.pop("out_size"), **arguments)


def test_bad_parameters_are_refused():
    params = neutral(2, 8, 8)
    params.order[1] = torch.tensor([0, 1, 1, 3])
    with pytest.raises(ValueError, match="params: an order is no permutation"):
        augment(pictures(2, 8, 8), params, 8)
    good = vars(neutral(2, 8, 8))
    with pytest.raises(ValueError, match="flip"):
        AugmentParams(**good | {"flip": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(TypeError, match="factors"):
        AugmentParams(**good | {"factors": torch.zeros(2, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="batch"):
        AugmentParams.sample(-1, (8, 8), AugmentPolicy())
    with pytest.raises(ValueError, match="image_size"):
        AugmentParams.sample(1, (8, 0), AugmentPolicy())
