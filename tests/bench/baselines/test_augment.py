"""The augmentation's peers make the same views, or views of the same distribution."""

import sys
from dataclasses import replace

import pytest
import torch

from bench.baselines import augment as baselines
from bench.baselines import info_nce as losses
from copgen_fast.augmentations import get
from copgen_fast.ops import AugmentParams, augment

BLURRED = replace(get("byol"), crop_scale=(0.2, 1.0), blur=0.5, solarize=0.3)
POLICIES = pytest.mark.parametrize("policy", [get("simclr"), get("no-color"), BLURRED], ids=["simclr", "flip", "blur"])


def drawn(n, side, policy, order=None):
    """Images, and parameters of the same order for all where one is given."""
    generator = torch.Generator().manual_seed(3)
    params = AugmentParams.sample(n, (side, side), policy, generator=generator)
    if order is not None:
        params.order[:] = torch.tensor(order)
    return torch.rand(n, 3, side, side, generator=generator), params


def ours(images, params, policy):
    return augment(images, params, images.shape[2], mean=policy.mean, std=policy.std)


@pytest.mark.parametrize("package", ["kornia", "lightly"])
def test_peers_of_a_missing_package_are_left_out_with_a_line(monkeypatch, capsys, package):
    real = baselines.version
    for module in (package, "lightly.loss" if package == "lightly" else "kornia.augmentation"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(baselines, "version", lambda name: None if name == package else real(name))
    policy = get("simclr")
    _, params = drawn(2, 16, policy)
    found = [baselines.fixed_peers(policy, 16, params), baselines.drawing_peers(policy, 16), losses.peers(0.1)]
    assert all(found) and not any(package in name for peers in found for name in peers)
    said = capsys.readouterr().out
    assert f"left out: {package}" in said and "pip install" in said


@POLICIES
def test_the_torchvision_loop_makes_our_views(policy):
    images, params = drawn(24, 40, policy)
    loop = baselines.torchvision_fixed(policy, 40, params)
    torch.testing.assert_close(loop(images), ours(images, params, policy), rtol=0, atol=1e-4)
    quantised = (images * 255).byte()
    torch.testing.assert_close(loop(quantised), ours(quantised, params, policy), rtol=0, atol=1e-4)


@POLICIES
def test_kornia_makes_our_views_where_the_order_is_one(policy):
    pytest.importorskip("kornia")
    images, params = drawn(24, 40, policy, order=(2, 0, 3, 1))
    if policy.solarize:  # the luminance weights differ in the fourth digit: enough to cross the threshold
        params.solarize[:] = torch.inf
    views = baselines.kornia_fixed(policy, 40, params)(images)
    torch.testing.assert_close(views, ours(images, params, policy), rtol=0, atol=5e-3)


@POLICIES
def test_the_batch_peer_applies_one_samples_parameters_to_all(policy):
    images, params = drawn(6, 40, policy)
    i = int(params.jitter.int().argmax())
    views = baselines.torchvision_batch_fixed(policy, 40, params)(images)
    torch.testing.assert_close(views[i], ours(images, params, policy)[i], rtol=0, atol=1e-4)


@POLICIES
def test_peers_that_draw_agree_in_distribution(policy):
    images = torch.linspace(0, 1, 20).expand(300, 3, 20, 20) * torch.tensor([1.0, 0.7, 0.3])[:, None, None]
    torch.manual_seed(0)
    params = AugmentParams.sample(300, (20, 20), policy)
    expected = ours(images, params, policy)
    for name, peer in baselines.drawing_peers(policy, 20).items():
        views = peer(images)
        assert views.shape == expected.shape and views.isfinite().all(), name
        if "one draw for all" not in name:
            assert (views.mean((0, 2, 3)) - expected.mean((0, 2, 3))).abs().max() < 0.2, name
            assert (views.std((0, 2, 3)) / expected.std((0, 2, 3)) - 1).abs().max() < 0.15, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_peers_are_differentiable_in_the_precision_of_the_images(dtype):
    policy = get("simclr")
    images, params = drawn(4, 24, policy)
    for name, peer in baselines.fixed_peers(policy, 24, params).items():
        if " v2 " not in name:
            leaf = images.to(dtype).requires_grad_()
            views = peer(leaf)
            assert views.dtype == dtype, name
            views.float().sum().backward()
            assert leaf.grad.abs().sum() > 0, name
