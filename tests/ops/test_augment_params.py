"""Drawing augmentation parameters: replay, distributions, errors."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from copgen_fast.augmentations import get
from copgen_fast.ops import Augment, AugmentParams, AugmentPolicy, augment

ORDERS = list(itertools.permutations(range(4)))
FIELDS = ("crop", "flip", "order", "factors", "jitter", "gray", "blur", "solarize")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_equal_params(one, other):
    for name in FIELDS:
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


class Sizes(TorchDispatchMode):
    """Most numbers that each operator was given."""

    def __init__(self):
        super().__init__()
        self.most = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        self.most[name] = max(self.most[name], *(x.numel() for x in args if isinstance(x, torch.Tensor)), 0)
        return func(*args, **(kwargs or {}))


def test_a_batch_is_drawn_without_waiting_for_other_threads():
    for name in ("simclr", "simclr-paper"):
        with Sizes() as seen:
            AugmentParams.sample(352, (128, 128), get(name), generator=seeded())
        assert max(seen.most[name] for name in ("exp", "sqrt")) < 100, "MKL shares more"
        assert seen.most["round"] < 2048, "PyTorch shares more"


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


@pytest.mark.parametrize("side", [2, 16, 32, 128, 224])
def test_blur_weights_follow_simclr(side):
    policy = AugmentPolicy(blur=0.5, blur_sigma=(0.1, 2.0))
    blur = AugmentParams.sample(4000, (300, 300), policy, out_size=(side, side + 3), generator=seeded()).blur
    radius = blur.shape[1] // 2
    # A tenth of the side, as SimCLR's own code rounds it, but never less than 3 weights.
    assert radius == max(1, side // 10 // 2)
    torch.testing.assert_close(blur.sum(1), torch.ones(4000))
    assert torch.equal(blur, blur.flip(1))
    none = blur[:, radius] == 1
    # The narrowest of the drawn Gaussians rounds to no blur too.
    assert 0.5 - 0.03 < none.double().mean() < 0.5 + 0.1
    # Neighbouring weights give sigma back.
    sigma = (-0.5 / (blur[:, radius + 1] / blur[:, radius]).double().log()).sqrt()[~none]
    assert sigma.max() <= 2.001 and sigma.median().item() == pytest.approx(1.1, abs=0.15)


def test_solarize_thresholds():
    policy = AugmentPolicy(solarize=0.2, solarize_threshold=0.25)
    solarize = AugmentParams.sample(10000, (8, 8), policy, generator=seeded()).solarize
    assert set(solarize.tolist()) == {0.25, math.inf}
    assert (solarize == 0.25).double().mean().item() == pytest.approx(0.2, abs=0.02)


def test_neutral_parameters_are_of_the_device_and_size():
    params = AugmentParams.neutral(3, (5, 7), "meta")
    assert len(params) == 3 and params.crop.device.type == "meta"
    assert AugmentParams.neutral(2, (5, 7)).crop.tolist() == [[0, 0, 5, 7]] * 2


# Errors.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.2)),
        ("crop_scale", (0.2, 1.5)),
        ("crop_scale", (1e-320, 1.0)),
        ("crop_scale", (0.2, "1")),
        ("crop_ratio", (0.0, 1.0)),
        ("crop_ratio", (1e308, 1e308)),
        ("crop_ratio", (1e-320, 1.0)),
        ("crop_ratio", (0.75, math.nan)),
        ("crop_ratio", 1.0),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("gray", math.nan),
        ("flip", "0.5"),
        ("brightness", -1.0),
        ("contrast", math.inf),
        ("saturation", 1e300),
        ("hue", None),
        ("hue", 0.6),
        ("blur", 2.0),
        ("blur_sigma", (0.0, 1.0)),
        ("blur_sigma", (0.1, math.inf)),
        ("blur_sigma", (1e-320, 1.0)),
        ("solarize", -1.0),
        ("solarize_threshold", 1.5),
        ("mean", (0.5,)),
        ("mean", (0.5, 0.5, math.nan)),
        ("mean", "abc"),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (1e-320, 0.5, 0.5)),
        ("std", (math.inf, 0.5, 0.5)),
    ],
)
def test_a_policy_names_its_bad_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}:"):
        AugmentPolicy(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("flip", torch.zeros(3, dtype=torch.bool), ValueError),
        ("factors", torch.zeros(2, 4, dtype=torch.float64), TypeError),
        ("crop", torch.zeros(2, 3, dtype=torch.int64), ValueError),
        ("blur", torch.ones(2, 2), ValueError),
        ("solarize", torch.ones(2, dtype=torch.bool), TypeError),
    ],
)
def test_parameters_name_their_bad_field(field, value, error):
    with pytest.raises(error, match=f"^{field}:"):
        AugmentParams(**vars(AugmentParams.neutral(2, 8)) | {field: value})


@pytest.mark.parametrize(
    "policy",
    [
        AugmentPolicy(crop_scale=(1e-6, 1e-6), crop_ratio=(1e-6, 1e6), brightness=1e6, contrast=1e6, jitter=1.0),
        AugmentPolicy(crop_scale=(1.0, 1.0), crop_ratio=(1e6, 1e6), saturation=1e6, hue=0.5, jitter=1.0, gray=1.0),
        AugmentPolicy(blur=1.0, blur_sigma=(1e-6, 1e6), solarize=1.0, solarize_threshold=0.0, std=(1e-6, 1.0, 1e6)),
    ],
)
def test_the_most_that_a_policy_may_hold_gives_finite_views(policy):
    images = torch.rand(8, 3, 9, 30, generator=seeded())
    assert Augment(policy, 12)(images, generator=seeded()).isfinite().all()


SIZES = (np.int64(8), np.array([8, 8]), np.array(8), torch.tensor(8), torch.Size([8, 8]), [np.uint8(8), 8])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
def test_sizes_of_any_integers(size):
    policy, images = get("simclr"), torch.rand(2, 3, 8, 8, generator=seeded())
    views = Augment(policy, size, views=np.int32(2))(images, generator=seeded())
    assert torch.equal(views, Augment(policy, 8, views=2)(images, generator=seeded()))
    params = AugmentParams.sample(np.int64(2), size, policy, out_size=size, generator=seeded())
    assert_equal_params(params, AugmentParams.sample(2, (8, 8), policy, generator=seeded()))
    assert len(AugmentParams.neutral(np.int64(2), size)) == 2


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, np.float32])
def test_statistics_of_any_numbers(kind):
    mean, std = (0.25, 0.5, 0.75), (0.5, 0.25, 1.0)
    images, params = torch.rand(2, 3, 8, 8, generator=seeded()), AugmentParams.neutral(2, 8)
    expected = augment(images, params, 8, mean=mean, std=std)
    given = [tuple(map(kind, x)) if kind is np.float32 else kind(x) for x in (mean, std)]
    assert torch.equal(augment(images, params, 8, mean=given[0], std=given[1]), expected)
    assert AugmentPolicy(mean=given[0], std=given[1]) == AugmentPolicy(mean=mean, std=std)


@pytest.mark.parametrize("size", [True, 8.0, np.float64(8), "8", "88", (8, True), torch.ones(2), -8, None])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="out_size: expected a positive integer or two"):
        Augment(get("simclr"), size)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="batch"):
        AugmentParams.sample(-1, (8, 8), AugmentPolicy())
    with pytest.raises(ValueError, match="image_size"):
        AugmentParams.sample(1, (8, 0), AugmentPolicy())
    with pytest.raises(ValueError, match="out_size"):
        AugmentParams.sample(1, (8, 8), AugmentPolicy(), out_size=(1.5, 2))
