"""`augment` against torchvision's float-tensor path, image by image, in values and gradients, by every CPU backend."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import _functional_tensor as tv_tensor
from torchvision.transforms import functional as tv

from copgen_fast.augmentations import get
from copgen_fast.ops import Augment, AugmentParams, AugmentPolicy, augment
from copgen_fast.ops.backend import INSTALLED

ORDERS = list(itertools.permutations(range(4)))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TOLERANCE = {torch.float32: {"rtol": 0, "atol": 1e-5}, torch.float64: {"rtol": 0, "atol": 1e-12}}
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-10}


every_backend = pytest.mark.parametrize("backend", [name for name in ("cpp", "reference") if name in INSTALLED])


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


def tv_blur(image, weights):
    """torchvision's gaussian_blur, given its weights in place of its sigma."""
    radius, weights = len(weights) // 2, weights.to(image.dtype)
    kernel = torch.outer(weights, weights).expand(3, 1, -1, -1)
    padded = torch.nn.functional.pad(image[None], (radius,) * 4, mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel, groups=3)[0]


TV_OPS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv_hue)


def tv_augment(images, params, out_size, mean=None, std=None):
    """The pipeline out of torchvision's functions, one image at a time."""
    out = []
    for i in range(len(params)):
        x = images[i % len(images)]
        if x.dtype == torch.uint8:
            x = x.float() / 255
        x = tv.resized_crop(x, *params.crop[i].tolist(), out_size, InterpolationMode.BILINEAR, antialias=True)
        x = tv.hflip(x) if params.flip[i] else x
        if params.jitter[i]:
            for op in params.order[i].tolist():
                x = TV_OPS[op](x, params.factors[i, op].item())
        x = tv.rgb_to_grayscale(x, 3) if params.gray[i] else x
        if params.blur.shape[1] > 1:
            x = tv_blur(x, params.blur[i])
        x = tv.solarize(x, params.solarize[i].item()) if params.solarize[i].isfinite() else x
        out.append(x if mean is None else tv.normalize(x, mean, std))
    return torch.stack(out)


def assert_same(images, params, out_size, backend, **statistics):
    """Values within the tolerance of the dtype; the gradient of a random functional too, where there is one."""
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    leaf = images.clone().requires_grad_(images.dtype != torch.uint8)
    ours = augment(leaf, params, out_size, out_dtype=dtype, backend=backend, **statistics)
    theirs = tv_augment(leaf, params, out_size, **statistics)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    assert ours.shape == (len(params), 3, *out_size)
    if leaf.requires_grad:
        weights = torch.randn(ours.shape, generator=seeded(5), dtype=dtype)
        got, want = (torch.autograd.grad(x, leaf, weights)[0] for x in (ours, theirs))
        assert (got - want).norm() <= RELATIVE[dtype] * want.norm()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_op_alone(backend, op, dtype):
    values = (-0.5, -0.1, 0.07, 0.33, 0.5) if op == 3 else (0.0, 0.6, 0.9, 1.1, 1.4)
    params = neutral(5, 7, 9)
    params.factors[:, op] = torch.tensor(values)
    assert_same(pictures(5, 7, 9, dtype), params, (7, 9), backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_orders(backend, dtype):
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
    assert_same(pictures(n, 8, 8, dtype), params, (8, 8), backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("out_size", [(16, 16), (5, 23), (33, 7), (1, 1)])
def test_the_whole_pipeline(backend, dtype, out_size):
    images = pictures(24, 19, 14)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    params = AugmentParams.sample(24, (19, 14), get("simclr"), generator=seeded(1))
    assert_same(images, params, out_size, backend, **IMAGENET)


@every_backend
@pytest.mark.parametrize("crop", [(0, 0, 1, 1), (3, 2, 4, 9), (0, 0, 17, 13), (16, 12, 1, 1), (2, 0, 15, 3)])
@pytest.mark.parametrize("out_size", [(3, 5), (17, 13), (40, 31)])
def test_crops_up_and_down(backend, crop, out_size):
    params = neutral(2, 17, 13)
    params.crop[:] = torch.tensor(crop)
    params.flip[1] = True
    assert_same(pictures(2, 17, 13, torch.float64), params, out_size, backend)


@every_backend
@settings(deadline=None, max_examples=30)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    # PyTorch 2.14.1's antialiased interpolate repeats the first row where the result is one pixel wide.
    out_size=st.tuples(st.integers(1, 20), st.integers(2, 20)),
    seed=st.integers(0, 999),
)
def test_any_sizes(backend, size, out_size, seed):
    params = AugmentParams.sample(3, size, get("simclr"), generator=seeded(seed))
    images = pictures(3, *size, torch.float64, seed)
    ours = augment(images, params, out_size, out_dtype=torch.float64, backend=backend)
    torch.testing.assert_close(ours, tv_augment(images, params, out_size), rtol=0, atol=1e-12)


@every_backend
def test_one_pixel_wide_results_are_the_transpose_of_one_pixel_high_ones(backend):
    images, params = pictures(2, 6, 9, torch.float64), neutral(2, 6, 9)
    params.crop[1] = torch.tensor([1, 2, 4, 5])
    turned = neutral(2, 9, 6)
    turned.crop[1] = torch.tensor([2, 1, 5, 4])
    wide = augment(images.mT, turned, (1, 7), out_dtype=torch.float64, backend=backend)
    torch.testing.assert_close(augment(images, params, (7, 1), out_dtype=torch.float64, backend=backend), wide.mT)


STRONG = AugmentPolicy(
    crop_scale=(0.2, 1.0), flip=0.5, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, jitter=1.0, gray=0.2
)


# Among so many pixels some float32 values round across a kink, where gradients jump; float64 ones do not.
@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize(("blur", "solarize"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_blur_and_solarize(backend, dtype, blur, solarize):
    policy = replace(STRONG, blur=blur, solarize=solarize)
    images = pictures(12, 40, 44, torch.float64)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    params = AugmentParams.sample(12, (40, 44), policy, out_size=(41, 60), generator=seeded(3))
    assert_same(images, params, (41, 60), backend)


@every_backend
def test_blur_weights_are_torchvisions(backend):
    params = AugmentParams.sample(1, (60, 60), AugmentPolicy(blur=1.0, blur_sigma=(1.3, 1.3)))
    images = pictures(1, 60, 60)
    expected = tv.gaussian_blur(images, [7, 7], [1.3, 1.3])
    torch.testing.assert_close(augment(images, params, 60, backend=backend), expected, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [2, 3])
def test_several_views_of_each_image(backend, views, dtype):
    params = AugmentParams.sample(5 * views, (13, 18), STRONG, generator=seeded(4))
    assert_same(pictures(5, 13, 18, dtype), params, (12, 11), backend)


@every_backend
def test_neutral_parameters_are_the_identity_in_value_and_gradient(backend):
    # Tied and saturated channels included: a neutral factor must not even clamp.
    images = torch.tensor([0.0, 0.5, 1.0]).repeat(2, 3, 4, 1).requires_grad_()
    out = augment(images, neutral(2, 4, 3), (4, 3), backend=backend)
    weights = torch.randn(out.shape, generator=seeded())
    assert torch.equal(out, images) and torch.equal(torch.autograd.grad(out, images, weights)[0], weights)


@every_backend
def test_gray_pixels_take_torchvisions_gradient(backend):
    params = neutral(1, 4, 4)
    params.factors[:, 3] = 0.1
    assert_same(pictures(1, 4, 4, torch.float64)[:, :1].expand(-1, 3, -1, -1), params, (4, 4), backend)


@every_backend
@pytest.mark.parametrize("clamp", ["exact", "straight_through"])
def test_gradcheck(backend, clamp):
    # Kinks (clamps that saturate, channels that tie) are measure zero; straight-through needs none to saturate.
    images = (0.3 + 0.4 * pictures(3, 4, 5, torch.float64)).requires_grad_()
    params = AugmentParams.sample(3, (4, 5), get("simclr"), generator=seeded(3))
    params.factors[:, :3] = params.factors[:, :3].clamp(0.9, 1.1)

    def run(x):
        return augment(x, params, (3, 6), out_dtype=torch.float64, clamp=clamp, **IMAGENET, backend=backend)

    assert torch.autograd.gradcheck(run, images)


@every_backend
def test_straight_through_keeps_the_values_and_lets_the_gradient_pass(backend):
    images = pictures(4, 6, 6).requires_grad_()
    params = neutral(4, 6, 6)
    params.factors[:, 0] = 3.0
    exact, through = (
        augment(images, params, 6, clamp=clamp, backend=backend) for clamp in ("exact", "straight_through")
    )
    assert torch.equal(exact, through) and (exact == 1).any()
    blocked, passed = (torch.autograd.grad(x.sum(), images)[0] for x in (exact, through))
    torch.testing.assert_close(passed, torch.full_like(images, 3.0))
    torch.testing.assert_close(blocked, 3.0 * (images.detach() * 3 <= 1))


@every_backend
def test_an_image_does_not_depend_on_its_neighbours(backend):
    images = pictures(6, 9, 9)
    params = AugmentParams.sample(6, (9, 9), get("simclr"), generator=seeded(2))
    together = augment(images, params, 8, backend=backend)
    alone = [augment(images[i : i + 1], params[i : i + 1], 8, backend=backend) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(backend, n):
    images = pictures(n, 5, 6).requires_grad_()
    out = Augment(get("simclr"), (4, 3), backend=backend)(images, generator=seeded())
    out.sum().backward()
    assert out.shape == (n, 3, 4, 3) and images.grad.shape == images.shape


LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "turned": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, 0)[::2].repeat_interleave(2, 3)[..., ::2],
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_input_layouts_and_dtypes(backend, layout, dtype):
    images = pictures(4, 9, 11)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    params = AugmentParams.sample(4, (9, 11), STRONG, generator=seeded())
    leaf = LAYOUTS[layout](images).requires_grad_(dtype != torch.uint8)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    views = augment(leaf, params, 8, out_dtype=out_dtype, backend=backend)
    plain = images.double() / 255 if dtype == torch.uint8 else images.double()
    plain.requires_grad_()
    expected = tv_augment(plain, params, (8, 8))
    torch.testing.assert_close(views, expected.to(out_dtype), rtol=0, atol=1e-5)
    if leaf.requires_grad:
        (got,) = torch.autograd.grad(views.sum(), leaf)
        (want,) = torch.autograd.grad(expected.sum(), plain)
        assert got.dtype == dtype and got.shape == images.shape
        # Only the last rounding is to the images' dtype.
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@every_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_layouts_and_dtypes(backend, memory_format, out_dtype):
    images, params = pictures(4, 8, 6), AugmentParams.sample(4, (8, 6), STRONG, generator=seeded())
    plain = augment(images, params, 8, **IMAGENET, backend=backend)
    views = augment(images, params, 8, out_dtype=out_dtype, memory_format=memory_format, **IMAGENET, backend=backend)
    assert views.is_contiguous(memory_format=memory_format)
    assert views.dtype == out_dtype and torch.equal(views, plain.to(out_dtype))


@every_backend
def test_autocast_changes_nothing(backend):
    images, params = pictures(4, 8, 6), AugmentParams.sample(4, (8, 6), STRONG, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            augment(images, params, 8, backend=backend),
            augment(images, params, 8, out_dtype=torch.float32, backend=backend),
        )
        views = augment(images, params, 8, backend=backend)
    assert torch.equal(views, augment(images, params, 8, backend=backend))


@every_backend
def test_nan_spreads_no_further_than_it_must(backend):
    images = pictures(3, 8, 8)
    images[1, 0, 3, 4] = torch.nan
    params = neutral(3, 8, 8)
    params.factors[:] = torch.tensor([0.9, 1.0, 1.1, 0.05])
    views = augment(images, params, 8, backend=backend)
    assert views[[0, 2]].isfinite().all() and views[1, :, 3, 4].isnan().all()
    params.factors[:, 1] = 0.9
    assert augment(images, params, 8, backend=backend)[1].isnan().all()


@every_backend
def test_two_runs_are_bit_equal(backend):
    images = pictures(8, 12, 12).requires_grad_()
    params = AugmentParams.sample(8, (12, 12), get("simclr"), generator=seeded())
    grads = [
        torch.autograd.grad(augment(images, params, 10, backend=backend).square().sum(), images)[0] for _ in range(2)
    ]
    assert torch.equal(*grads)


@every_backend
def test_the_module_draws_applies_and_normalises(backend):
    policy, images = get("simclr"), pictures(5, 12, 10)
    params = AugmentParams.sample(5, (12, 10), policy, generator=seeded(7))
    expected = augment(images, params, 8, **IMAGENET, backend=backend)
    module = Augment(policy, 8, backend=backend)
    assert torch.equal(module(images, generator=seeded(7)), expected)
    assert torch.equal(module(images, params), expected)
    assert "out_size=(8, 8)" in repr(module)


@every_backend
def test_the_module_makes_several_views_in_any_form(backend):
    policy, images = get("simclr"), pictures(5, 12, 10)
    form = {"out_dtype": torch.bfloat16, "memory_format": torch.channels_last, "clamp": "straight_through"}
    views = Augment(policy, 8, views=2, **form, backend=backend)(images, generator=seeded(7))
    params = AugmentParams.sample(10, (12, 10), policy, out_size=8, generator=seeded(7))
    assert torch.equal(views, augment(images, params, 8, **IMAGENET, **form, backend=backend))
    assert views.shape == (10, 3, 8, 8) and views.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="views"):
        Augment(policy, 8, views=0, backend=backend)


# Range of the images.


OTHER_SCALES = {"0..255": lambda x: 255 * x, "[-1, 1]": lambda x: 2 * x - 1}


@every_backend
@pytest.mark.parametrize("policy", ["simclr", "byol"])
@pytest.mark.parametrize("scale", OTHER_SCALES)
def test_images_of_another_scale_are_refused_with_the_range_that_came(backend, policy, scale):
    images = OTHER_SCALES[scale](pictures(3, 9, 9))
    module = Augment(get(policy), 6, views=2, backend=backend)
    found = f"images: expected values in \\[0, 1\\], got some from {images.min():.4g} to {images.max():.4g}"
    with pytest.raises(ValueError, match=found):
        module(images, generator=seeded())
    unchecked = Augment(get(policy), 6, views=2, check_range=False, backend=backend)
    assert unchecked(images, generator=seeded()).isfinite().all()
    with pytest.raises(ValueError, match="images: expected values in"):
        augment(images, neutral(3, 9, 9), 9, check_range=True, backend=backend)


@every_backend
def test_rounding_beyond_the_range_and_nan_are_taken(backend):
    images = 1.005 * pictures(3, 9, 9)
    images[0, 0, 0, 0] = torch.nan
    assert torch.equal(augment(images, neutral(3, 9, 9), 9, backend=backend)[1:], images[1:])


def test_a_compiled_graph_refuses_them_too():
    images = 255 * pictures(3, 9, 9)
    with pytest.raises(Exception, match="images: expected values in"):
        torch.compile(lambda x: augment(x, neutral(3, 9, 9), 9), backend="aot_eager")(images)


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1.0]}, TypeError, "images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, TypeError, "images"),
        ({"images": torch.zeros(2, 1, 8, 8)}, ValueError, "images"),
        ({"images": torch.zeros(3, 3, 8, 8)}, ValueError, "params: 2 rows for 3 images"),
        ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "params: 2 rows for 0 images"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format"),
        ({"backend": "cuda"}, ValueError, "backend: augment on cpu has no 'cuda'"),
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


def test_a_blur_wider_than_the_view_is_refused():
    params = replace(neutral(2, 8, 8), blur=torch.full((2, 9), 1 / 9))
    with pytest.raises(ValueError, match="params: a blur of radius 4"):
        augment(pictures(2, 8, 8), params, (8, 4))


def test_an_order_that_is_no_permutation_is_refused():
    for order in ([0, 1, 1, 3], [0, 1, 2, 4], [-1, 1, 2, 3]):
        params = neutral(2, 8, 8)
        params.order[1] = torch.tensor(order)
        with pytest.raises(ValueError, match="params: an order is no permutation"):
            augment(pictures(2, 8, 8), params, 8)
