"""StyleGAN2 beside the paper's equations, and its weights in the layouts of NVIDIA's release and rosinality's port."""

import os
import re

import pytest
import torch
from torch import nn

from copgen_fast import generators
from copgen_fast.errors import CopgenError
from copgen_fast.generators.stylegan2 import Config, StyleGAN2
from copgen_fast.runtime import latents
from tests.helpers.stylegan2_fixtures import mapped, port_state, small_stylegan2, stylegan2, write_pickle

CASES = {
    "z": (32, Config(), {}),
    "psi": (16, Config(psi=0.6), {"clamp": 1.5}),
    "w": (16, Config(space="w"), {}),
    "no noise": (16, Config(noise="none"), {"colours": 1}),
    "weights without noise": (16, Config(), {"noise": False}),
    "classes": (16, Config(psi=0.5), {"classes": 3}),
    "short embedding": (8, Config(psi=0.5), {"classes": 3, "embedding": 4}),
    "4 pixels": (4, Config(), {}),
    "256 pixels": (256, Config(space="w", psi=0.5), {}),
}


def with_gradient(images, z):
    pattern = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)
    return images.detach(), torch.autograd.grad((images * pattern).sum(), z)[0]


def drawn(generator, n=3):
    z = torch.randn(n, generator.latent_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(n) % generator.classes if generator.classes else None
    return z.to(generator.mapping.w_avg.dtype).requires_grad_(), labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_images_and_gradients_are_the_papers(case, dtype, tolerance):
    side, config, shape = CASES[case]
    generator = small_stylegan2(side, dtype, config=config, **shape)
    z, labels = drawn(generator, 1 if side > 64 else 2)
    found = with_gradient(generator(z, labels), z)
    state = {name: value.double() for name, value in generator.state_dict().items()}
    exact = z.detach().double().requires_grad_()
    if config.space == "w":
        ws = exact.unflatten(1, (-1, generator.w_dim))
    else:
        ws = mapped(state, exact, labels, config.psi)[:, None].expand(-1, generator.layers, -1)
    images = stylegan2(state, ws, config.noise == "const" and shape.get("noise", True), shape.get("clamp"))
    assert images.shape == (len(z), *generator.image_shape) and 0.3 < images.abs().lt(1).double().mean()
    for ours, theirs in zip(found, with_gradient(images, exact), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture
def published():
    return small_stylegan2(16, torch.float32)


def same(published, path, *options):
    built = generators.build("stylegan2", path, options)
    state = published.state_dict()
    assert built.state_dict().keys() == state.keys()
    for name, value in built.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
    return built


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_of_the_release_is_read_without_running_it(published, tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.chdir(tmp_path)
    source = "open('touched', 'w')"
    path = write_pickle(tmp_path / "network.pkl", published, monkeypatch, source, protocol=protocol)
    z = torch.randn(2, 6)
    assert torch.equal(same(published, path)(z), published(z))
    assert os.listdir(tmp_path) == ["network.pkl"] and "under 'G_ema.' are taken" in capsys.readouterr().out


def test_clamps_rates_and_half_precision_are_read_from_the_pickle(tmp_path, monkeypatch):
    published = small_stylegan2(16, torch.float32, clamp=0.5, rate=0.02)
    built = generators.build("stylegan2", write_pickle(tmp_path / "network.pkl", published, monkeypatch))
    assert (built.shape.clamp, built.shape.rate, built.shape.half_blocks) == (0.5, 0.02, 3)
    assert torch.equal(built(torch.ones(1, 6)), published(torch.ones(1, 6)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beside": {"x": os.system}}, "names posix.system, which runs code"),
        (
            {"beside": {"x": nn.Identity()}},
            "names torch.nn.modules.activation.Identity|Identity, which no StyleGAN2 needs",
        ),
        ({"architecture": "resnet"}, "synthesis.b4 has architecture 'resnet', expected skip"),
        ({"activation": "relu"}, "conv1 has activation 'relu', expected lrelu"),
        ({"conv_clamp": "no"}, "conv_clamp is"),
    ],
)
def test_what_no_stylegan2_has_is_refused_by_name(published, tmp_path, monkeypatch, options, words):
    path = write_pickle(tmp_path / "network.pkl", published, monkeypatch, **options)
    with pytest.raises(CopgenError, match=f"network.pkl.*({words})"):
        generators.build("stylegan2", path)


def test_an_embedding_of_another_length_than_w_is_read(tmp_path, monkeypatch):
    published = small_stylegan2(8, torch.float32, classes=3, embedding=4)
    built = same(published, write_pickle(tmp_path / "network.pkl", published, monkeypatch))
    assert (built.shape.z_dim, built.classes) == (6, 3)


def test_a_state_dict_of_the_release_is_read(published, tmp_path):
    torch.save({"model": published.state_dict()}, tmp_path / "weights.pth")
    assert same(published, tmp_path / "weights.pth").shape.clamp == 256


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_of_the_port_is_read(tmp_path, average):
    published = small_stylegan2(32, torch.float32, mapping=(6, 6))
    for name, value in published.state_dict().items():
        if re.search("conv1.resample|b4.resample", name):  # filters that no layer uses, and the port doesn't store
            value.copy_(torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64)
    if not average:
        z = torch.randn(40000, 6)
        published.mapping.w_avg.copy_(published.mapping(z).mean(0))
    stored = {"latent_avg": published.mapping.w_avg.clone()} if average else {}
    content = {"g": port_state(small_stylegan2(32, torch.float32, 1, mapping=(6, 6))), "g_ema": port_state(published)}
    torch.save(content | stored, tmp_path / "port.pt")
    if average:
        built = same(published, tmp_path / "port.pt", "psi=0.5")
        z = torch.randn(2, 6)
        published.config = Config(psi=0.5)
        torch.testing.assert_close(built(z), published(z))
    else:
        built = generators.build("stylegan2", tmp_path / "port.pt")
        torch.testing.assert_close(built.mapping.w_avg, published.mapping.w_avg, rtol=0, atol=0.05)


def port(path, generator, **beside):
    torch.save({"g_ema": port_state(generator)} | beside, path)
    return path


def test_an_average_of_every_layer_is_read(tmp_path):
    published = small_stylegan2(16, torch.float32, mapping=(6, 6))
    path = port(tmp_path / "psp.pt", published, latent_avg=published.mapping.w_avg.repeat(6, 1))
    assert torch.equal(generators.build("stylegan2", path).mapping.w_avg, published.mapping.w_avg)


def test_a_port_without_noise_gets_the_same_in_each_run(tmp_path, capsys):
    published = small_stylegan2(16, torch.float32, mapping=(6, 6))
    state = {name: value for name, value in port_state(published).items() if not name.startswith("noises.")}
    torch.save({"g_ema": state}, tmp_path / "port.pt")
    built, again = (generators.build("stylegan2", tmp_path / "port.pt") for _ in range(2))
    assert "port.pt holds no noise" in capsys.readouterr().out
    noise = [value for name, value in built.state_dict().items() if name.endswith("noise_const")]
    assert [len(value) for value in noise] == [4, 8, 8, 16, 16] and not noise[1].equal(noise[2])
    assert 0.7 < noise[-1].std() < 1.3
    z = torch.randn(2, 6)
    assert torch.equal(built(z), again(z))
    quiet = generators.build("stylegan2", tmp_path / "port.pt", ["noise=none"])
    complete = generators.build("stylegan2", port(tmp_path / "complete.pt", published), ["noise=none"])
    assert torch.equal(quiet(z), complete(z))


def test_a_port_of_too_many_blocks_is_refused_before_its_noise_is_drawn(tmp_path):
    state = {"input.input": torch.ones(1, 2, 4, 4)} | {f"to_rgbs.{i}.bias": torch.ones(1, 3, 1, 1) for i in range(30)}
    torch.save(state, tmp_path / "port.pt")
    with pytest.raises(CopgenError, match="port.pt does not fit StyleGAN2: 30 blocks after the first"):
        generators.build("stylegan2", tmp_path / "port.pt")


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda state: {"conv.weight": torch.ones(3)}, "holds no StyleGAN2 but 1 tensors: conv.weight"),
        (
            lambda state: {
                "G_ema": {"synthesis.input.freqs": torch.ones(4, 2), "mapping.fc0.weight": torch.ones(5, 6)}
            },
            "holds no StyleGAN2 but a StyleGAN3, which is another network",
        ),
        (
            lambda state: {"GAN": {"SE.net.0.weight": torch.ones(3, 3), "GE.initial_block": torch.ones(1, 3, 4, 4)}},
            "holds no StyleGAN2 but a network of the package stylegan2-pytorch",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "torgb" not in k or "b16" in k},
            "blocks don't each give an image",
        ),
        (lambda state: state | {"synthesis.b64.const": torch.ones(1)}, r"blocks for \[4, 8, 16, 64\] pixels"),
        (
            lambda state: {k: v for k, v in state.items() if k != "synthesis.b8.conv1.weight"},
            "missing synthesis.b8.conv1",
        ),
        (lambda state: state | {"synthesis.b4.torgb.weight": torch.ones(4, 7, 1, 1)}, "images of 4 channels"),
        (lambda state: state | {"synthesis.b8.conv0.noise_const": torch.ones(4, 4)}, r"noise_const is \[4, 4\]"),
        (
            lambda state: state | dict.fromkeys(("mapping.fc1.weight", "mapping.embed.weight"), torch.ones(12, 9)),
            "no place",
        ),
    ],
)
def test_other_networks_are_refused(published, tmp_path, alter, words):
    torch.save(alter(published.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(CopgenError, match=f"weights.pth.*{words}"):
        generators.build("stylegan2", tmp_path / "weights.pth")


def test_a_network_of_tensorflow_is_named(tmp_path):
    (tmp_path / "network.pkl").write_bytes(b"\x80\x02cdnnlib.tflib.network\nNetwork\n)\x81}b.")
    with pytest.raises(CopgenError, match="network.pkl holds no StyleGAN2 but a network of TensorFlow: convert it"):
        generators.build("stylegan2", tmp_path / "network.pkl")


def test_a_port_with_something_missing_is_refused(tmp_path):
    state = port_state(small_stylegan2(16, torch.float32, mapping=(6, 6)))
    del state["convs.1.noise.weight"]
    torch.save({"g_ema": state}, tmp_path / "port.pt")
    with pytest.raises(CopgenError, match="port.pt does not fit StyleGAN2: missing g_ema.convs.1.noise.weight"):
        generators.build("stylegan2", tmp_path / "port.pt")


def test_latents_of_space_w_are_drawn_through_the_mapping_network(published, tmp_path):
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    assert generators.build("stylegan2", tmp_path / "weights.pth").prior == "normal"
    generator = generators.build("stylegan2", tmp_path / "weights.pth", ["space=w", "psi=0.5"])
    assert generator.prior == "own"
    drawn = generator.sample(3, 4)
    assert generator.latent_groups == (5,) * 6 and drawn.shape == (4, 30) and drawn.dtype == torch.float32
    assert drawn.equal(generator.sample(3, 4)) and drawn[:, :5].equal(drawn[:, -5:])
    one_by_one = torch.cat([generator.sample(seed, 1) for seed in range(40)])
    for batch in (3, 40):  # a latent's bits are its seed's, however many are drawn at once
        parts = (range(first, min(first + batch, 40)) for first in range(0, 40, batch))
        at_once = [latents.each(generator.sample, seeds) for seeds in parts]
        assert torch.cat(at_once).equal(one_by_one)
    assert latents.each(generator.sample, []).shape == (0, generator.latent_dim)
    in_z = StyleGAN2(generator.shape, Config(psi=0.5))
    in_z.load_state_dict(generator.state_dict())
    z = latents.sample("normal", 3, (4, 6))
    torch.testing.assert_close(generator(drawn), in_z(z))


def test_classes_have_no_space_w():
    with pytest.raises(CopgenError, match="space=w of stylegan2: these weights have classes"):
        small_stylegan2(8, classes=2, config=Config(space="w"))
