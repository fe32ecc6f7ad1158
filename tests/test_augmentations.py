import pytest
import torch

from copgen_fast import augmentations
from copgen_fast.augmentations import POLICIES, get, random_views, simclr_paper
from copgen_fast.errors import UsageError
from copgen_fast.ops import Augment
from copgen_fast.runtime import seeds


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs(name):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = Augment(get(name), 12)(images, generator=torch.Generator().manual_seed(1))
    assert views.shape == (3, 3, 12, 12) and views.isfinite().all()


def test_simclr_has_the_reference_values():
    policy = get("simclr")
    assert policy.crop_scale == (0.2, 1.0) and policy.crop_ratio == (3 / 4, 4 / 3) and policy.flip == 0.5
    assert (policy.brightness, policy.contrast, policy.saturation, policy.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (policy.jitter, policy.gray) == (0.8, 0.2)
    assert policy.mean == (0.485, 0.456, 0.406) and policy.std == (0.229, 0.224, 0.225)


def test_the_ablations_keep_the_flip_and_drop_what_they_name():
    simclr, no_color, no_crop = get("simclr"), get("no-color"), get("no-crop")
    assert no_color.flip == no_crop.flip == simclr.flip
    assert no_color.crop_scale == simclr.crop_scale and no_color.jitter == no_color.gray == 0
    assert no_crop.crop_scale is None and (no_crop.jitter, no_crop.gray) == (simclr.jitter, simclr.gray)


def test_none_only_normalises():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (get("none").mean, get("none").std))
    torch.testing.assert_close(Augment(get("none"), 8)(images), (images - mean) / std)


def test_digits_never_mirrors_and_keeps_gray_gray():
    images = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    views = Augment(get("digits"), 16)(images, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(views[:, 0], views[:, 2], rtol=0, atol=1e-6)
    assert get("digits").flip == 0


def test_an_unknown_name_lists_the_known_ones():
    known = "simclr, no-color, no-crop, none, simclr-paper, infomin, infomin-basic, byol, digits"
    with pytest.raises(UsageError, match=f"'simclr2'.*{known}"):
        get("simclr2")


def test_the_papers_own_policies():
    simclr, infomin, byol = get("simclr-paper"), get("infomin"), get("byol")
    assert (simclr.crop_scale, simclr.blur, simclr.blur_sigma) == ((0.08, 1.0), 0.5, (0.1, 2.0))
    strengths = ("brightness", "contrast", "saturation", "hue")
    assert [getattr(simclr, name) for name in strengths] == [0.8, 0.8, 0.8, 0.2]
    assert [getattr(simclr_paper(0.5), name) for name in strengths] == [0.4, 0.4, 0.4, 0.1]
    assert infomin.blur == 0.5 and (byol.blur, byol.solarize) == (0.1, 0.2)


def test_views_are_replayed_by_their_key_and_drawn_per_image():
    policy = augmentations.get("simclr")
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.expand(6, -1, -1, -1).contiguous()
    views = random_views(images, policy, seeds.generator(0, "pretrain views", 3))
    assert views.shape == images.shape and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, random_views(images, policy, seeds.generator(0, "pretrain views", 3)))
    assert not torch.equal(views, random_views(images, policy, seeds.generator(0, "pretrain views", 4)))
    assert all(not torch.equal(views[0], view) for view in views[1:])


def test_views_are_differentiable():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    random_views(images, augmentations.get("no-color"), seeds.generator(0)).sum().backward()
    assert images.grad.abs().sum() > 0
