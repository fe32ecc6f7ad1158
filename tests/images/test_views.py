"""Views of photographs against Pillow and torchvision, and the statistics of random crops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from copgen_fast.images.views import Centre, RandomCrop, Squash, Whole


def photograph(height, width, seed=0):
    """Smooth colours with some noise, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    colours = np.stack([np.sin(5 * x + c) * np.cos(4 * y - c) for c in range(3)], axis=2)
    noise = np.random.default_rng(seed).normal(0, 0.05, colours.shape)
    return ((colours + noise).clip(-1, 1) * 127 + 128).astype(np.uint8)


def pillow(image, size, box=None):
    image = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(image)).movedim(2, 0)


def near(a, b):
    return (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(90, 120), (90, 121), (123, 90), (91, 124), (100, 100), (77, 300), (41, 37)])
@pytest.mark.parametrize(("size", "shorter"), [(28, 32), (27, 32), (32, 32)])
def test_the_centre_is_that_of_torchvisions_resize_and_centre_crop(shape, size, shorter):
    pixels = photograph(*shape)
    theirs = transforms.CenterCrop(size)(transforms.Resize(shorter)(Image.fromarray(pixels)))
    assert near(Centre(size, shorter, "bilinear")(pixels), torch.from_numpy(np.array(theirs)).movedim(2, 0))


@pytest.mark.parametrize("shape", [(32, 32), (32, 43), (47, 32), (32, 128)])
def test_the_centre_of_an_image_of_its_size_is_cut_out_as_it_is(shape):
    pixels = photograph(*shape)
    centre = Centre(28, 32)(pixels)
    theirs = np.array(transforms.CenterCrop(28)(Image.fromarray(pixels)))
    assert torch.equal(centre, torch.from_numpy(theirs).movedim(2, 0)) and centre.is_contiguous()
    pixels[:] = 0
    assert centre.any(), "its own memory"


def test_the_centre_of_a_whole_image_that_was_resized_before_is_the_same():
    for shape in [(90, 121), (123, 90), (91, 124)]:
        pixels = photograph(*shape)
        stored = Whole(32)(pixels).permute(1, 2, 0).numpy()
        top, left = Centre(32).corner(stored.shape[:2])
        assert Centre(32)(stored).equal(Centre(32)(pixels))
        assert Centre(32)(stored).equal(torch.from_numpy(stored[top : top + 32, left : left + 32]).movedim(2, 0))


def test_squash_takes_the_whole_image():
    pixels = photograph(90, 120)
    assert near(Squash(32)(pixels), pillow(pixels, (32, 32)))


def ramp(height, width):
    """Pixels that tell where they lie: red is the row, green the column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], axis=2).astype(np.uint8)


def box_of(crop):
    """Top, left, height and width of a crop of `ramp`, by the differences between the resized pixels."""
    red, green = crop[0].double(), crop[1].double()
    size = crop.shape[1]
    height, width = ((side[-2] - side[1]) / (size - 3) * size for side in (red[:, 0], green[0]))
    return red[:, 0].mean() - height / 2 + 0.5, green[0].mean() - width / 2 + 0.5, height, width


def test_random_crops_have_the_areas_and_shapes_that_were_named():
    pixels, view = ramp(200, 240), RandomCrop(40, ("crops",), scale=(0.2, 0.8), flip=0)
    boxes = torch.tensor([box_of(view(pixels, index)) for index in range(300)])
    top, left, height, width = boxes.unbind(1)
    area, ratio = height * width / (200 * 240), width / height
    assert 0.17 < area.min() < 0.25 and 0.7 < area.max() < 0.84
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert ratio.log().mean().abs() < 0.03, "even in logarithms"
    assert top.min() > -2 and left.min() > -2 and (top + height).max() < 202 and (left + width).max() < 242
    assert 80 < (top + height / 2).mean() < 120, "about the middle"


def test_crops_are_those_of_their_image_and_key_alone():
    pixels, view = photograph(60, 80), RandomCrop(24, ("crop", 1), flip=0)
    assert view(pixels, 5).equal(view(pixels, 5))
    assert not view(pixels, 5).equal(view(pixels, 6)), "each image has its own"
    assert not view(pixels, 5).equal(RandomCrop(24, ("crop", 2), flip=0)(pixels, 5)), "and each epoch"
    assert RandomCrop(24, ("crop", 1), flip=1)(pixels, 5).flip(2).equal(view(pixels, 5))
    flips = [RandomCrop(24, ("flips",), crop=False)(pixels, i).equal(Squash(24)(pixels)) for i in range(200)]
    assert 75 < sum(flips) < 125


def test_an_image_that_no_crop_fits_gives_its_largest_centre_of_an_allowed_ratio():
    crop = RandomCrop(8, ("strip",), flip=0)(ramp(10, 200), 0)
    _, left, _, width = box_of(crop)
    assert width == pytest.approx(10 * 4 / 3, abs=1.5) and left + width / 2 == pytest.approx(100, abs=1)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31))
def test_every_shape_gives_a_square_of_the_size(height, width, size, index):
    pixels = photograph(height, width)
    for view in (Centre(size), Centre(size, size + 3), Squash(size), RandomCrop(size, ("any",))):
        taken = view(pixels, index)
        assert taken.shape == (3, size, size) and taken.dtype == torch.uint8
