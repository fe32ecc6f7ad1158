"""Backends agree on images of one colour at the thresholds of clamps, of the hue and of the solarisation."""

import pytest
import torch

from copgen_fast.ops import AugmentParams, augment
from copgen_fast.ops.backend import INSTALLED
from tests.helpers.constant_images import assert_alike


@pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")
@pytest.mark.parametrize("seed", range(20))
def test_five_hundred_constant_images(seed):
    assert_alike("cpp", 500, seed)


@pytest.mark.parametrize("backend", [name for name in ("cpp", "reference") if name in INSTALLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("colour", [0.1, 0.25, 1 / 3, 128 / 255, 0.9, 1.0])
def test_a_constant_image_at_the_threshold_is_inverted_whatever_its_resize_rounds_to(backend, dtype, colour):
    params = AugmentParams.neutral(9, 9)
    params.crop[:, 2] = torch.arange(1, 10)
    params.solarize[:] = colour
    colour = params.solarize[0].item()
    images = torch.full((9, 3, 9, 9), colour, dtype=dtype)
    views = augment(images, params, 7, out_dtype=dtype, backend=backend)
    torch.testing.assert_close(views, torch.full_like(views, 1 - colour))
