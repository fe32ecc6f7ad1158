"""BigBiGAN as published, and its rewritings."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from copgen_fast import generators
from copgen_fast.errors import UsageError
from copgen_fast.generators import _optimize as levels
from copgen_fast.generators import bigbigan, optimize
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.generators.bigbigan import BigBiGAN
from tests.helpers.bigbigan_fixtures import bigbigan as unfolded
from tests.helpers.bigbigan_fixtures import small_bigbigan as make
from tests.helpers.on_gpu import needs_gpu


@pytest.fixture(scope="module")
def published():
    return make()


@pytest.fixture(scope="module")
def z(published):
    return torch.randn(3, published.latent_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_published_size_has_the_published_names():
    with torch.device("meta"):
        full = BigBiGAN()
    state = full.state_dict()
    assert len(state) == 166 and full.latent_dim == 120 and full.image_shape == (3, 128, 128)
    assert sum(p.numel() for p in full.parameters()) == 70_433_988
    assert sum(b.numel() for b in full.buffers()) == 63_644
    shapes = {
        "shared.weight": (1000, 128),
        "linear.weight": (24576, 20),
        "linear.u0": (1, 24576),
        "blocks.0.0.bn1.gain.weight": (1536, 148),
        "blocks.4.0.conv_sc.weight": (96, 192, 1, 1),
        "blocks.3.1.g.weight": (96, 192, 1, 1),
        "blocks.3.1.gamma": (),
        "output_layer.2.weight": (3, 96, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_it_is_the_unfolded_computation(published, z):
    z = z.clone().requires_grad_()
    images, expected = published(z), unfolded(published.state_dict(), z, 4, 2)
    assert images.shape == (3, 3, 64, 64) and images.abs().max() < 1 and images.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
    gradient, of_z = (torch.autograd.grad(y.square().sum(), z)[0] for y in (images, expected))
    torch.testing.assert_close(gradient, of_z, rtol=1e-10, atol=1e-10)


def test_sides_are_four_times_a_power_of_two():
    with pytest.raises(ValueError, match="resolution: .* got 48"):
        BigBiGAN(2, 48)


@pytest.mark.parametrize("resolution", [8, 32, 128])
def test_other_sizes_in_float32(resolution):
    generator = make(2, resolution, torch.float32)
    rewritten = optimize(generator)
    assert rewritten.latent_dim == generator.latent_dim and rewritten.image_shape == (3, resolution, resolution)
    z = torch.randn(2, generator.latent_dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rewritten(z), generator(z), rtol=0, atol=1e-5)
    assert rewritten(z[:0]).shape == generator(z[:0]).shape == (0, 3, resolution, resolution)
    torch.testing.assert_close(rewritten(z)[:1], rewritten(z[:1]), rtol=0, atol=1e-5)


def kept_bytes(generator, z):
    """Of all that a forward leaves for its backward but the weights."""
    kept, own = {}, {x.untyped_storage().data_ptr() for x in (*generator.parameters(), *generator.buffers())}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        generator(z.clone().requires_grad_())
    return sum(size for place, size in kept.items() if place not in own)


def test_what_is_kept_for_the_backward(published, z):
    """Lean convolutions keep nothing, and normalisations their inputs: about one tensor where there were two."""
    everything, lean, again = (
        kept_bytes(optimize(published, rewrites=rewrites, checkpoint=checkpoint), z)
        for rewrites, checkpoint in ((replace(Rewrites(), lean=False), False), (Rewrites(), False), (Rewrites(), True))
    )
    assert again < 0.6 * lean and lean < 0.7 * everything


@pytest.mark.parametrize("level", ["exact", "half"])
def test_no_comparison_convolves_in_tf32(level, monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    steps = BigBiGAN.steps
    monkeypatch.setattr(levels, "MEAN_GATE", 255.0)
    monkeypatch.setattr(levels, "TAIL_GATE", 255.0)
    monkeypatch.setattr(BigBiGAN, "steps", lambda *a: seen.append(cudnn.conv.fp32_precision) or steps(*a))
    published, before = make(dtype=torch.float32), cudnn.allow_tf32
    optimize(published, level)
    assert seen and not {"tf32"} & set(seen) and cudnn.allow_tf32 == before


class Replayed:
    """Stands in for a CUDA graph: computes again what was captured, into the same memory."""

    def __init__(self, call, latents, labels):
        self.call, self.inputs, self.images, self.replays = call, (latents, labels), call(latents, labels), 0

    def replay(self):
        self.replays += 1
        self.images.copy_(self.call(*self.inputs))


def graphed(monkeypatch, generator, batch):
    def capture(*arguments):
        with torch.no_grad():
            stand_in = Replayed(*arguments)
        return stand_in, stand_in.images

    monkeypatch.setattr(levels, "capture", capture)
    return levels.Graphed(optimize(generator, "half"), batch)


def check_a_graph_runs_only_what_it_was_made_for(graph, z, replays):
    plain = graph.generator
    with torch.no_grad():
        first, second = graph(z), graph(z + 1)
        torch.testing.assert_close(first, plain(z))
        torch.testing.assert_close(second, plain(z + 1))
        assert replays() in (None, 2)
        torch.testing.assert_close(graph(z[:2]), plain(z[:2]))
    leaf = z.clone().requires_grad_()
    assert torch.autograd.grad(graph(leaf).square().sum(), leaf)[0].abs().sum() > 0
    assert replays() in (None, 2)
    with torch.no_grad():
        graph(leaf)
    assert replays() in (None, 3) and not graph(z).requires_grad


def test_a_graph_runs_only_what_it_was_made_for(monkeypatch):
    graph = graphed(monkeypatch, generators.build("digits"), 3)
    assert graph.half_dtype == torch.bfloat16 and graph.difference.mean < levels.MEAN_GATE
    z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    check_a_graph_runs_only_what_it_was_made_for(graph, z, lambda: graph.graph.replays)


@needs_gpu
def test_a_gpus_graph_runs_only_what_it_was_made_for():
    graph = levels.Graphed(optimize(generators.build("digits").cuda(), "half"), 3)
    z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).cuda()
    check_a_graph_runs_only_what_it_was_made_for(graph, z, lambda: None)


def test_differences_are_counted_in_levels():
    exact = torch.zeros(1, 3, 10, 100)
    images = exact.clone()
    images[0, 0, 0, :3] = 10 / 127.5
    found = levels.difference(images, exact)
    assert found.mean == pytest.approx(0.01) and found.tail == pytest.approx(10)
    assert found.shares[10] == pytest.approx(0.001) and found.shares[0] == pytest.approx(0.999)


def test_generators_without_a_rewriting_stay_as_they_are():
    digits = generators.build("digits")
    assert optimize(digits) is digits
    half = optimize(digits, "half")
    z = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert levels.difference(half(z), digits(z)).mean < levels.MEAN_GATE
    assert digits.inward.weight.dtype == torch.float32


def test_levels_that_cannot_be_are_refused():
    digits = generators.build("digits")
    with pytest.raises(UsageError, match="level: expected exact, half or graph, got 'fast'"):
        optimize(digits, "fast")
    with pytest.raises(UsageError, match="level graph needs a GPU"):
        optimize(digits, "graph", batch=8)
    with pytest.raises(UsageError, match="the CPU has no float16"):
        optimize(digits, "half", dtype=torch.float16)


# Weights.


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bigbigan, "BigBiGAN", lambda: make(2, 16, torch.float32, seed=3))
    return make(2, 16, torch.float32, seed=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("found_by", ["argument", "variable"])
def test_weights_are_found_and_loaded(small, tmp_path, monkeypatch, suffix, found_by):
    monkeypatch.setattr(bigbigan, "FILE", f"weights{suffix}")
    path = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in small.state_dict().items()}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    if found_by == "variable":
        monkeypatch.setenv("COPGEN_WEIGHTS", str(tmp_path))
    generator = generators.build("bigbigan", path if found_by == "argument" else None)
    z = torch.randn(2, small.latent_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generator(z), small(z))
