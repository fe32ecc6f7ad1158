"""StyleGAN2, rewritten to be fast: the same function as the published form, which `test_stylegan2` compares."""

from dataclasses import replace

import pytest
import torch

from copgen_fast.errors import CopgenError
from copgen_fast.generators import _folded_stylegan2, _folding, _strips, optimize
from copgen_fast.generators import _optimize as levels
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.generators.stylegan2 import Config
from copgen_fast.ops import winograd
from tests.generators.test_stylegan2 import drawn, with_gradient
from tests.helpers.stylegan2_fixtures import small_stylegan2

CASES = {
    "z": (64, Config(psi=0.7), {}),
    "w": (32, Config(space="w"), {"clamp": 1.0}),
    "no noise": (16, Config(noise="none"), {"colours": 1}),
    "classes": (16, Config(), {"classes": 3, "noise": False}),
    "short embedding": (8, Config(psi=0.5), {"classes": 3, "embedding": 4}),
    "256 pixels": (256, Config(), {"clamp": 2.0}),
}


def expect_equal(published, rewritten, tolerance, n=2):
    z, labels = drawn(published, n)
    pairs = zip(with_gradient(rewritten(z, labels), z), with_gradient(published(z, labels), z), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    with torch.no_grad():
        images, expected = rewritten(z, labels), published(z, labels)
    assert (images - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_rewritten_exactly(case, dtype, tolerance):
    side, config, shape = CASES[case]
    published = small_stylegan2(side, dtype, config=config, **shape)
    rewritten = optimize(published)
    expect_equal(published, rewritten, tolerance, 1 if side > 64 else 2)
    assert not list(rewritten.parameters())
    for attribute in ("classes", "latent_dim", "image_shape", "latent_groups"):
        assert getattr(rewritten, attribute) == getattr(published, attribute)


@pytest.mark.parametrize("without", [None, "modulation", "upsampling", "winograd", "strips", "lean", "channels_last"])
@pytest.mark.parametrize("many", [1, 10**9], ids=["fewer products", "convolutions"])
def test_every_rewriting_alone_is_exact(monkeypatch, many, without):
    monkeypatch.setattr(_folding, "MANY", many)
    monkeypatch.setattr(_folded_stylegan2, "FEW", 10**9 if many == 1 else 0)
    for name in ("TILED", "TILED_SIDE"):
        monkeypatch.setattr(_folded_stylegan2, name, many)
    for module, name in ((_strips, "VALUES"), (winograd, "TILES")):
        monkeypatch.setattr(module, name, many)  # a strip a row, or all in one
    published = small_stylegan2(16)
    rewrites = Rewrites() if without is None else replace(Rewrites(), **{without: False})
    expect_equal(published, optimize(published, rewrites=rewrites), 1e-9)


def test_a_rewriting_that_is_wrong_is_refused_by_its_layer(monkeypatch):
    monkeypatch.setattr(_folded_stylegan2, "EPSILON", 0.1)
    with pytest.raises(CopgenError, match=r"StyleGAN2 differs .* after (mapping|b4.conv1)"):
        optimize(small_stylegan2(16))


def test_blocks_may_be_computed_again_in_the_backward():
    published = small_stylegan2(16)
    expect_equal(optimize(published), optimize(published, checkpoint=True), 1e-12)


def test_autocast_leaves_the_chosen_precision():
    rewritten = optimize(small_stylegan2(16, torch.float32))
    z, labels = drawn(rewritten)
    expected = with_gradient(rewritten(z, labels), z)
    with torch.autocast("cpu", torch.bfloat16):
        images = rewritten(z, labels)
    for ours, theirs in zip(with_gradient(images, z), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clamp", [None, 2.0])
def test_half_precision_is_that_of_the_last_blocks(monkeypatch, clamp):
    monkeypatch.setattr(levels, "TAIL_GATE", 40.0)
    monkeypatch.setattr(levels, "MEAN_GATE", 4.0)
    published = small_stylegan2(32, torch.float32, clamp=clamp, half_blocks=2)
    half = optimize(published, "half")
    assert 0 < half.difference.mean < 4
    z, _ = drawn(published)
    steps = zip(half.steps(z), published.steps(z), strict=True)
    dtypes = {name: (ours.dtype, ours) for (name, ours), _ in steps}
    assert dtypes["b8.conv1"][0] == dtypes["images"][0] == torch.float32 and dtypes["b16.conv0"][0] == torch.bfloat16
    (_, gradient), (_, exact) = (with_gradient(one(z), z) for one in (half, published))
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), 0) > 0.97


def test_empty_batches_and_latents_are_checked():
    rewritten = optimize(small_stylegan2(16))
    z = torch.zeros(0, 6, dtype=torch.float64)
    assert rewritten(z).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^z: expected shape \[N, 6\]"):
        rewritten(z[:, 1:])
    with pytest.raises(ValueError, match="^z: holds NaN"):
        rewritten(torch.full((1, 6), torch.nan, dtype=torch.float64))
