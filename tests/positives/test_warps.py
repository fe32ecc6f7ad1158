"""Composed homographies against torchvision and the published formulas, masks, and amounts drawn."""

import math

import pytest
import torch
import torchvision.transforms.functional as F

from copgen_fast.config import SteeringConfig
from copgen_fast.errors import UsageError
from copgen_fast.positives import _warps

EVERY = _warps.RANGES["photographs"]


def amounts_of(**values):
    """One row of amounts, and the limits of the transformations in it."""
    limits = {name: EVERY[name] for name in _warps.NAMES if name in values}
    return torch.tensor([[float(values[name]) for name in limits]], dtype=torch.float64), limits


def transformed(images, **values):
    amount, limits = amounts_of(**values)
    inverse = _warps.homographies(amount, limits, images.shape[2:]).expand(len(images), 3, 3)
    return _warps.transform(images, inverse, _warps.colours(amount, limits).expand(len(images), 3))


def moved(x, y, size, zoom=1.0, shift_x=0.0, shift_y=0.0, rotate=0.0, perspective=0.0):
    """Where a point, counted from the image's centre, comes to lie: one transformation after the other."""
    height, width = size
    f, p, d = math.hypot(height, width), math.radians(perspective), math.radians(rotate)
    depth = x * math.sin(p) + f
    x, y = f * (x * math.cos(p) - perspective / 5 * width / 256) / depth, f * y / depth
    x, y = x * math.cos(d) + y * math.sin(d), -x * math.sin(d) + y * math.cos(d)
    return x / zoom + shift_x * width, y / zoom + shift_y * height


CASES = [
    {"rotate": 20},
    {"zoom": 0.6},
    {"zoom": 1.7, "rotate": -30},
    {"shift_x": 0.2, "shift_y": -0.3},
    {"perspective": 45},
    {"zoom": 1.3, "shift_x": 0.1, "shift_y": 0.05, "rotate": 15, "perspective": -50},
]


@pytest.mark.parametrize("size", [(12, 17), (32, 32)])
@pytest.mark.parametrize("values", CASES)
def test_one_homography_is_torchvisions_perspective_of_the_corners_moved_one_by_one(values, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    found, mask = transformed(images, **values)
    height, width = size
    corners = [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]
    ends = [moved(x, y, size, **values) for x, y in corners]
    points = [[[x + width / 2, y + height / 2] for x, y in which] for which in (corners, ends)]
    expected, ones = (F.perspective(of, *points, fill=None) for of in (images, torch.ones_like(images)))
    assert torch.equal(mask.bool().expand_as(ones), ones > 1 - 1e-5), "the pixels that lie within the image"
    torch.testing.assert_close(found, expected * mask, rtol=0, atol=2e-5)  # it solves for its matrix in float32
    assert 0.1 < mask.mean() <= 1


def test_affine_ones_are_torchvisions_affine():
    images = torch.rand(1, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, mask = transformed(images, rotate=25, zoom=1.25, shift_x=0.1, shift_y=-0.05)
    bilinear = F.InterpolationMode.BILINEAR
    expected = F.affine(images, angle=-25, translate=[2.0, -1.0], scale=0.8, shear=[0.0], interpolation=bilinear)
    torch.testing.assert_close(found, expected * mask, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("angle", [-60, -20, 0, 35, 60])
def test_at_256_pixels_the_published_formulas_differ_by_less_than_two_pixels(angle):
    """Theirs turn about pixel 128 rather than the centre 127.5, and a plane one pixel before the axis."""
    amount, limits = amounts_of(perspective=angle, rotate=angle / 2)
    forward = torch.linalg.inv(_warps.homographies(amount, limits, (256, 256)))[0]
    f, p, d = math.hypot(256, 256), math.radians(angle), math.radians(angle / 2)
    for x, y in ((0, 0), (255, 0), (80, 140), (255, 255)):
        X, Y = x - 128, y - 128
        depth = X * math.sin(p) + math.cos(p) + f
        u, v = f * (X * math.cos(p) - math.sin(p) - angle / 5) / depth, f * Y / depth
        theirs = u * math.cos(d) + v * math.sin(d) + 128, -u * math.sin(d) + v * math.cos(d) + 128
        a, b, c = (forward @ torch.tensor([x - 127.5, y - 127.5, 1.0], dtype=torch.float64)).tolist()
        assert math.dist(theirs, (a / c + 127.5, b / c + 127.5)) < 2


def test_nothing_done_is_the_image_itself_and_colours_are_added_in_the_mask():
    images = torch.rand(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same, mask = transformed(images, zoom=1, shift_x=0, shift_y=0, rotate=0, perspective=0, red=0, brightness=0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-12)
    assert mask.all()
    tinted, mask = transformed(images, shift_x=2 / 9, red=0.25, blue=-0.5, brightness=0.125)
    assert mask[..., :2].sum() == 0 and mask[..., 2:].all() and tinted[..., :2].abs().sum() == 0
    added = torch.tensor([0.375, 0.125, -0.375], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(tinted[..., 2:], images[..., :-2] + added)


def test_amounts_fill_their_ranges_and_steps_are_the_published_units():
    uniform = torch.rand(4000, len(_warps.NAMES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    amount = dict(zip(EVERY, _warps.amounts(uniform, EVERY).unbind(1), strict=True))
    for name, limit in EVERY.items():
        low = 1 / limit if name == "zoom" else -limit
        assert amount[name].min().item() == pytest.approx(low, abs=0.01 * limit)
        assert amount[name].max().item() == pytest.approx(limit, abs=0.01 * limit)
    zoom = amount["zoom"]
    assert (zoom < 1).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert zoom.log().mean().item() == pytest.approx(0.155, abs=0.05)  # uniform in and out, not in the logarithm
    steps = dict(zip(EVERY, _warps.steps(_warps.amounts(uniform, EVERY), EVERY).unbind(1), strict=True))
    torch.testing.assert_close(steps["zoom"], zoom.log())
    torch.testing.assert_close(steps["rotate"], amount["rotate"] / 30)
    torch.testing.assert_close(steps["shift_x"], amount["shift_x"] * 256 / 100)
    torch.testing.assert_close(steps["green"], amount["green"])
    some = {name: EVERY[name] for name in ("rotate", "blue")}
    torch.testing.assert_close(_warps.amounts(uniform, some)[:, 0], amount["rotate"])


def test_steps_shown_go_from_end_to_end():
    assert _warps.between("rotate", 30.0, 3).tolist() == [-30, 0, 30]
    torch.testing.assert_close(_warps.between("zoom", 4.0, 5), torch.tensor([0.25, 0.5, 1, 2, 4], dtype=torch.float64))


def test_limits_are_presets_with_what_is_given():
    assert list(_warps.limits_of(SteeringConfig())) == [name for name in _warps.NAMES if name != "brightness"]
    digits = _warps.limits_of(SteeringConfig(ranges="digits", limits=("rotate=10",)))
    assert digits == {"zoom": 2.0, "shift_x": 0.15, "shift_y": 0.15, "rotate": 10.0, "brightness": 0.5}
    assert list(_warps.limits_of(SteeringConfig(transformations=("blue", "zoom")))) == ["zoom", "blue"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformations": ("zoom", "shear")}, "transformations: unknown or repeated 'shear': choose from zoom"),
        ({"transformations": ("zoom", "zoom")}, "unknown or repeated 'zoom'"),
        ({"limits": ("brightness=1",)}, "'brightness=1': write NAME=LIMIT, NAME one of zoom"),
        ({"limits": ("zoom=big",)}, "zoom: expected a number, got 'big'"),
        ({"limits": ("zoom=1",)}, "zoom: expected more than 1 and at most 100, got 1"),
        ({"limits": ("perspective=90",)}, "perspective: expected more than 0 and at most 80"),
        ({"limits": ("red=nan",)}, "red: expected more than 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UsageError, match=message):
        _warps.limits_of(SteeringConfig(**options))
