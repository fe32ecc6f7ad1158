"""`rand_augment` against Pillow's operations, image by image, and against float operations' gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as tv

from copgen_fast.augmentations import get
from copgen_fast.ops import Augment, AugmentParams, RandAugmentParams, RandAugmentPolicy, augment, rand_augment
from copgen_fast.ops.backend import INSTALLED
from copgen_fast.ops.rand_augment.operator import compiled_rand_augment
from copgen_fast.ops.rand_augment.params import AFFINE, FILL, NONE, OPERATIONS, matrices
from tests.helpers.host_reads import HostReads

every_backend = pytest.mark.parametrize("backend", [name for name in ("cpp", "reference") if name in INSTALLED])
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(n, height=40, width=56, dtype=torch.float32, seed=0):
    """Smooth images of whole levels with some noise; the second is flat, the third has few levels."""
    coarse = torch.rand(n, 3, 9, 12, generator=seeded(seed), dtype=torch.float64)
    images = F.interpolate(coarse, (height, width), mode="bicubic") * 255
    images = images + 2 * torch.randn(images.shape, generator=seeded(seed + 1), dtype=torch.float64)
    images[1:2], images[2:3] = 77, images[2:3] // 16 + 100
    return images.round().clamp(0, 255).to(dtype) / 255


def drawn(n, *names, steps=1, probability=1.0, seed=2):
    """Magnitudes that reach below the usual ones, so that Solarize and Posterize do something."""
    policy = RandAugmentPolicy(
        steps=steps, probability=probability, magnitude=8, magnitude_std=1.5, operations=names or OPERATIONS
    )
    uniform = torch.rand(n, 5 * steps, generator=seeded(seed), dtype=torch.float64)
    return RandAugmentParams.from_uniform(uniform, policy)


def given(name, value, n=1, cubic=False):
    number = torch.full((n, 1), OPERATIONS.index(name))
    return RandAugmentParams(number, torch.full((n, 1), float(value)), torch.full((n, 1), cubic))


def pillow(image, name, value, cubic):
    """The published operation of one picture."""
    how = {"resample": Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR, "fillcolor": FILL}

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)

    width, height = image.size
    operations = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(value, **how),
        "Posterize": lambda: ImageOps.posterize(image, int(value)),
        "Solarize": lambda: ImageOps.solarize(image, int(value)),
        "SolarizeAdd": lambda: image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * 3),
        "ShearX": lambda: affine(1, value, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, value, 1, 0),
        "TranslateX": lambda: affine(1, 0, value * width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, value * height),
    }
    return operations[name]() if name in operations else getattr(ImageEnhance, name)(image).enhance(value)


def pillow_all(images, params):
    """The operations of every image by Pillow, levels uint8 [N, 3, H, W]."""
    found = []
    for i, image in enumerate(images):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
        for number, value, cubic in zip(*(x[i].tolist() for x in vars(params).values()), strict=True):
            picture = picture if number == NONE else pillow(picture, OPERATIONS[number], value, cubic)
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(found)


@every_backend
@every_operation
def test_each_operation_equals_pillows(backend, name):
    images, params = photographs(12), drawn(12, name)
    levels = rand_augment(images, params, backend=backend) * 255
    difference = (levels - pillow_all(images, params)).abs().round()
    if name in AFFINE:  # single precision may fall on the other side of a whole level
        assert difference.max() <= 1 and (difference > 0).double().mean() < 2e-3
    else:
        assert difference.max() == 0
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


@every_backend
def test_in_double_precision_all_equal_pillows(backend):
    images, params = photographs(60, dtype=torch.float64), drawn(60, steps=2, probability=0.8)
    levels = rand_augment(images, params, backend=backend) * 255
    assert torch.equal(levels.round(), pillow_all(images, params).double())


@every_backend
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (97, 1)])
def test_any_size_equals_pillows(backend, size):
    images, params = photographs(45, *size, dtype=torch.float64), drawn(45)
    assert torch.equal(rand_augment(images, params, backend=backend).mul(255).round(), pillow_all(images, params))


@every_backend
def test_a_view_without_an_operation_is_not_rounded(backend):
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    params = given("Invert", 0, n=2)
    params.operation[1] = NONE
    views = rand_augment(images, params, backend=backend)
    assert torch.equal(views[1], images[1]) and not torch.equal(views[0], 1 - images[0])
    torch.testing.assert_close(views[0] * 255, 255 - (images[0] * 255).round())


@every_backend
def test_views_do_not_depend_on_their_batch(backend):
    images, params = photographs(9), drawn(9, steps=2)
    whole = rand_augment(images, params, backend=backend)
    alone = [
        rand_augment(images[i : i + 1], params.map(lambda x, i=i: x[i : i + 1]), backend=backend) for i in range(9)
    ]
    assert torch.equal(whole, torch.cat(alone)) and len(rand_augment(images[:0], params.map(lambda x: x[:0]))) == 0


@every_backend
def test_nan_spreads_over_its_view_alone(backend):
    images, params = photographs(len(OPERATIONS)), drawn(len(OPERATIONS))
    params.operation[:, 0] = torch.arange(len(OPERATIONS))
    images[3, 1, 2, 2] = torch.nan
    views = rand_augment(images, params, backend=backend)
    assert views[3].isnan().all() and views.isnan().flatten(1).any(1).sum() == 1


def masked(monkeypatch):
    """As on a GPU and in a compiled graph: every operation of every view, and a mask."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_without_looking_at_values_results_are_the_same(monkeypatch):
    images, params = photographs(len(OPERATIONS)).requires_grad_(), drawn(len(OPERATIONS), steps=2)
    by_rows = rand_augment(images, params, backend="reference")
    by_rows.square().sum().backward()
    gradient, images.grad = images.grad, None
    masked(monkeypatch)
    with HostReads() as reads:
        by_masks = rand_augment(images, params, backend="reference")
        by_masks.square().sum().backward()
    assert reads.count == 0
    assert torch.equal(by_rows, by_masks)
    torch.testing.assert_close(images.grad, gradient)


SMOOTH = {
    "Invert": (0, lambda x: 1 - x),
    "Equalize": (0, lambda x: x),
    "Posterize": (3, lambda x: x),
    "Solarize": (200, lambda x: tv.solarize(x, 199.5 / 255)),
    "SolarizeAdd": (50, lambda x: torch.where(x < 127.5 / 255, x + 50 / 255, x)),
    "Color": (1.8, lambda x: tv.adjust_saturation(x, 1.8)),
    "Contrast": (1.8, lambda x: tv.adjust_contrast(x, 1.8)),
    "Brightness": (1.8, lambda x: tv.adjust_brightness(x, 1.8)),
    "Sharpness": (1.8, lambda x: tv.adjust_sharpness(x, 1.8)),
    "AutoContrast": (
        0,
        lambda x: (x - x.amin((2, 3), True).detach()) / (x.amax((2, 3), True) - x.amin((2, 3), True)).detach(),
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_that_of_the_real_valued_operation(name):
    value, smooth = SMOOTH[name]
    # Neither flat nor near the ends of the range, where rounding decides what is clipped.
    images = photographs(5, 12, 12, torch.float64)[3:] * 0.35 + 0.2
    images = ((images * 255).round() / 255).requires_grad_()
    weights = torch.rand(images.shape, generator=seeded(4), dtype=torch.float64)
    ours = torch.autograd.grad(rand_augment(images, given(name, value, n=2)), images, weights)[0]
    theirs = torch.autograd.grad(smooth(images), images, weights)[0]
    # torchvision's luminance weights have four digits.
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert ours.abs().max() > 0.5


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("cubic", [False, True])
def test_the_gradient_of_an_affine_operation_is_its_adjoint(name, cubic):
    images = (photographs(4, 10, 14, torch.float64)[3:] * 0.5 + 0.25).requires_grad_()
    params = given(name, 20 if name == "Rotate" else 0.23, cubic=cubic)
    weights = torch.rand(images.shape, generator=seeded(4), dtype=torch.float64)
    ours = torch.autograd.grad(rand_augment(images, params), images, weights)[0]
    inside = rand_augment(torch.full_like(images, 0.8), params) == 0.8
    # The interpolation's weights add up to one.
    torch.testing.assert_close(ours.sum((2, 3)), (weights * inside).sum((2, 3)))
    if not cubic:
        a, b, c, d, e, f = matrices(params, 10, 14)[0, 0].tolist()
        y, x = torch.meshgrid(torch.arange(10).double() + 0.5, torch.arange(14).double() + 0.5, indexing="ij")
        grid = torch.stack([(a * x + b * y + c) / 7 - 1, (d * x + e * y + f) / 5 - 1], 2)[None]
        sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False) * inside
        torch.testing.assert_close(ours, torch.autograd.grad(sampled, images, weights)[0])


def test_clips_pass_no_gradient_or_all_of_it():
    images = torch.tensor([0.2, 0.9]).view(1, 1, 1, 2).repeat(1, 3, 1, 1).requires_grad_()
    for clamp, wanted in (("exact", [1.5, 0.0]), ("straight_through", [1.5, 1.5])):
        views = rand_augment(images, given("Brightness", 1.5), clamp=clamp)
        assert views[0, 0, 0, 1] == 1
        assert torch.autograd.grad(views.sum(), images)[0][0, 0, 0].tolist() == pytest.approx(wanted)


def test_second_and_forward_derivatives_are_those_of_a_piecewise_linear_function():
    images, params = photographs(30, 8, 9, torch.float64) * 0.5 + 0.2, drawn(30)

    def views(x):
        return rand_augment(x, params)

    u, w = torch.rand(2, *images.shape, generator=seeded(4), dtype=torch.float64)
    value, forward = torch.func.jvp(views, (images,), (u,))
    assert torch.equal(value, views(images))
    leaf, w = images.clone().requires_grad_(), w.requires_grad_()
    (backward,) = torch.autograd.grad(views(leaf), leaf, w, create_graph=True)
    torch.testing.assert_close((forward * w).sum(), (backward * u).sum())
    # The gradient is linear in w: its derivative along u is the operation's along u.
    torch.testing.assert_close(torch.autograd.grad(backward, w, u)[0], forward)
    torch.testing.assert_close(torch.func.vjp(views, images)[1](w)[0], backward)


def test_gradients_are_the_same_bits_every_time():
    images, params = photographs(6).requires_grad_(), drawn(6, *AFFINE, steps=2)
    weights = torch.randn(images.shape, generator=seeded(4))
    one, other = (torch.autograd.grad(rand_augment(images, params), images, weights)[0] for _ in range(2))
    assert torch.equal(one, other) and one.abs().sum() > 0


def test_the_default_policy_is_infomins():
    params = RandAugmentParams.from_uniform(
        torch.rand(40000, 10, dtype=torch.float64, generator=seeded()), RandAugmentPolicy()
    )
    operation, argument = params.operation, params.argument
    assert (operation == NONE).all(1).double().mean() == pytest.approx(0.25, abs=0.01)
    applied = operation[operation != NONE]
    assert (torch.bincount(applied, minlength=15) / len(applied) - 1 / 15).abs().max() < 0.005
    for name, most in (("Rotate", 30), ("ShearX", 0.3), ("ShearY", 0.3), ("TranslateX", 0.45), ("TranslateY", 0.45)):
        of = argument[operation == OPERATIONS.index(name)] / most
        assert (of.abs() == 1).double().mean() == pytest.approx(0.5, abs=0.03)  # magnitude 10
        assert (of.abs() < 0.918).double().mean() == pytest.approx(0.05, abs=0.015)
        assert of.sign().mean() == pytest.approx(0, abs=0.06) and of.abs().max() == 1
    for name, values in (("Posterize", (3, 4)), ("Solarize", range(200, 257)), ("SolarizeAdd", range(80, 111))):
        assert set(argument[operation == OPERATIONS.index(name)].tolist()) <= set(values)
    factors = argument[(operation >= OPERATIONS.index("Color")) & (operation <= OPERATIONS.index("Sharpness"))]
    assert factors.max() == pytest.approx(1.9) and factors.mean() == pytest.approx(1.86, abs=0.01)
    assert params.cubic.double().mean() == pytest.approx(0.5, abs=0.01)


WRONG = (
    *({"steps": value} for value in (0, 1.5, "2")),
    *({"probability": value} for value in (1.1, "1", math.nan)),
    {"magnitude": 11},
    {"magnitude_std": math.inf},
    {"operations": ("Cutout",)},
)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_policy_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        RandAugmentPolicy(**wrong)


def test_wrong_arguments_are_refused():
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="params: 3 rows on cpu for 2 images"):
        rand_augment(images, drawn(3))
    with pytest.raises(ValueError, match="clamp: expected one of exact, straight_through"):
        rand_augment(images, drawn(2), clamp="hard")
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        rand_augment(images.byte(), drawn(2))


@pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")
def test_opcheck():
    images, params = photographs(4, 6, 7), drawn(4, steps=2)
    torch.library.opcheck(compiled_rand_augment, (images, *vars(params).values(), matrices(params, 6, 7)))


def test_with_its_gradient_it_compiles_into_one_graph():
    images, params = photographs(3, 6, 7).requires_grad_(), drawn(3)
    compiled = torch.compile(rand_augment, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, params), rand_augment(images, params), rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("size", [128, 32])
def test_infomins_order_is_jitter_blur_operations_gray(backend, size):
    policy = get("infomin")
    params = AugmentParams.sample(24, (size, size), policy, generator=seeded())
    assert params.blur.shape == (24, {128: 13, 32: 3}[size])
    basic = AugmentParams.sample(24, (size, size), get("infomin-basic"), generator=seeded())
    assert torch.equal(basic.blur, params.blur) and basic.rand_augment is None
    images = photographs(24, size, size)
    basic.gray[:] = False
    views = rand_augment(augment(images, basic, size, backend=backend), params.rand_augment, backend=backend)
    views = torch.where(params.gray[:, None, None, None], tv.rgb_to_grayscale(views, 3), views)
    statistics = {"mean": policy.mean, "std": policy.std}
    ours = augment(images, params, size, **statistics, backend=backend)
    assert params.gray.any() and (params.rand_augment.operation >= 0).any()
    torch.testing.assert_close(ours, tv.normalize(views, **statistics), rtol=0, atol=1e-5)


def test_parameters_are_taken_apart_and_put_together():
    params = AugmentParams.sample(6, (8, 8), get("infomin"), generator=seeded())
    again = AugmentParams.cat([params[:2], params[2:]])
    for one, other in zip(vars(again.rand_augment).values(), vars(params.rand_augment).values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="RandAugment in all of them or in none"):
        AugmentParams.cat([params, AugmentParams.neutral(2, 8)])


def test_infomin_is_differentiable_as_the_navigator_needs_it():
    images = photographs(4, 24, 24).requires_grad_()
    Augment(get("infomin"), 24)(images, generator=seeded(1)).square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()
