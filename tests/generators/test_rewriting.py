"""BigBiGAN and BigGAN-deep, rewritten to be fast: the same functions, checked layer by layer, and in half precision."""

from dataclasses import fields, replace

import pytest
import torch

from copgen_fast.errors import CopgenError
from copgen_fast.generators import _folding, optimize
from copgen_fast.generators import _optimize as levels
from copgen_fast.generators._rewrites import Rewrites
from tests.helpers.bigbigan_fixtures import small_bigbigan
from tests.helpers.biggan_fixtures import small_biggan_deep

REWRITES = [field.name for field in fields(Rewrites)]
MAKERS = {
    "bigbigan": small_bigbigan,
    "biggan-deep": lambda dtype=torch.float64: small_biggan_deep(dtype, truncation=0.405),
}
# A layer, and the statistics of one of its normalisations.
LAYERS = {
    "bigbigan": (r"blocks\.1\.0", lambda generator: generator.blocks[1][0].bn2.stored_mean),
    "biggan-deep": (r"layers\.2", lambda generator: generator.network.generator.layers[2].bn_1.running_means[0]),
}


@pytest.fixture(scope="module", params=MAKERS)
def name(request):
    if request.param == "biggan-deep":
        pytest.importorskip("pytorch_pretrained_biggan")
    return request.param


@pytest.fixture(scope="module")
def published(name):
    return MAKERS[name]()


@pytest.fixture(scope="module")
def single(name):
    return MAKERS[name](dtype=torch.float32)


def inputs(generator, dtype=torch.float64):
    z = torch.randn(3, generator.latent_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return z.to(dtype), torch.arange(3) % generator.classes if generator.classes else None


def with_gradient(generator, z, labels, scale=1.0):
    z = z.clone().requires_grad_()
    images = generator(z, labels)
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)
    return images.detach(), torch.autograd.grad(scale * (images * weights).sum(), z)[0]


@pytest.fixture
def wide_gates(monkeypatch):
    """Random networks differ more by half precision than trained ones."""
    monkeypatch.setattr(levels, "TAIL_GATE", 40.0)
    monkeypatch.setattr(levels, "MEAN_GATE", 4.0)


@pytest.mark.parametrize("many", [1, 10**9], ids=["fewer products", "convolutions"])
@pytest.mark.parametrize("without", [None, *REWRITES])
def test_every_rewriting_is_exact(monkeypatch, published, many, without):
    monkeypatch.setattr(_folding, "MANY", many)
    rewrites = Rewrites() if without is None else replace(Rewrites(), **{without: False})
    rewritten = optimize(published, rewrites=rewrites)
    expected = with_gradient(published, *inputs(published))
    for ours, theirs in zip(with_gradient(rewritten, *inputs(published)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert not list(rewritten.parameters()) or not rewrites.spectral
    for attribute in ("classes", "latent_dim", "image_shape"):
        assert getattr(rewritten, attribute) == getattr(published, attribute)


def test_a_rewriting_that_is_wrong_is_refused_by_its_layer(name, published, monkeypatch):
    right, (layer, statistics) = _folding.Normalisation.scale_shift, LAYERS[name]

    def wrong(norm):
        matrix = right(norm)
        matrix[-1] += 0.01 * torch.equal(norm.mean, statistics(published))
        return matrix

    monkeypatch.setattr(_folding.Normalisation, "scale_shift", wrong)
    with pytest.raises(CopgenError, match=rf"{type(published).__name__} differs .* after {layer}"):
        optimize(published)


def test_blocks_may_be_computed_again_in_the_backward(published):
    kept, again = (
        with_gradient(optimize(published, checkpoint=choice), *inputs(published)) for choice in (False, True)
    )
    for ours, theirs in zip(again, kept, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("level", ["exact", "half"])
def test_autocast_leaves_the_chosen_precision(single, wide_gates, level):
    rewritten, z = optimize(single, level), inputs(single, torch.float32)
    expected = with_gradient(rewritten, *z)

    def within(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return rewritten(*inputs)

    for ours, theirs in zip(with_gradient(within, *z), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_says_by_how_much_it_differs(single, wide_gates, monkeypatch):
    half = optimize(single, "half")
    z, labels = levels._inputs(single, torch.device("cpu"))
    found = levels.difference(half(z, labels), single(z, labels))
    assert found.mean == pytest.approx(half.difference.mean, rel=1e-2) and 0 < found.mean < 4
    assert sum(found.shares) == pytest.approx(1) and "mean" in str(found)
    assert half(z, labels).dtype == torch.float32
    monkeypatch.setattr(levels, "MEAN_GATE", 1e-6)
    with pytest.raises(CopgenError, match=f"bfloat16 changes the images of {type(single).__name__} too much"):
        optimize(single, "half")


@torch.no_grad()
def test_compiles_to_one_graph(single):
    rewritten, z = optimize(single), inputs(single, torch.float32)
    compiled = torch.compile(rewritten, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*z), rewritten(*z))


@pytest.mark.parametrize("level", ["exact", "half"])
@pytest.mark.parametrize("scale", [1, 1e-5])
def test_gradients_keep_their_direction(single, wide_gates, level, scale):
    """1e-5: as the loss leaves them; float16, whose smallest number is 6e-8, is left to the loss scaling."""
    z = inputs(single, torch.float32)
    found, exact = (with_gradient(one, *z, scale)[1] for one in (optimize(single, level), single))
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.97
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.1)


@pytest.mark.parametrize("rewritten", [False, True])
def test_latents_are_checked(published, rewritten):
    generator = optimize(published) if rewritten else published
    z, labels = inputs(published)
    with pytest.raises(ValueError, match=rf"^z: expected shape \[N, {z.shape[1]}\], got \[3, {z.shape[1] - 1}\]"):
        generator(z[:, 1:], labels)
    with pytest.raises(TypeError, match="^z: expected torch.float64"):
        generator(z.float(), labels)
    with pytest.raises(ValueError, match="^z: holds NaN"):
        generator(z * torch.nan, labels)
