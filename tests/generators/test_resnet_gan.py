import copy

import pytest
import torch
from safetensors.torch import save_file

from copgen_fast import generators, registry
from copgen_fast.errors import UsageError
from copgen_fast.generators.resnet_gan import ResnetGAN


@pytest.fixture(scope="module")
def state():
    """A state dict whose batch norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = ResnetGAN(latent_dim=12, width=6)
        for _ in range(3):
            generator(torch.randn(16, 12))
    return generator.state_dict()


@pytest.fixture(scope="module")
def generator(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    save_file(state, path)
    return generators.build("resnet-gan", path)


def latents(n, seed=0):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


def test_it_is_registered():
    assert "resnet-gan" in registry.names("generators")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_images_have_the_announced_shape_and_range(generator, n):
    images = generator(10 * latents(n))
    assert images.shape == (n, *generator.image_shape) == (n, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.abs().le(1).all()


def test_sizes_are_those_of_the_file_and_the_papers_by_default(generator):
    assert (generator.latent_dim, generator.width) == (12, 6)
    with torch.device("meta"):
        paper = ResnetGAN()
    assert (paper.latent_dim, paper.width) == (128, 256)
    assert sum(parameter.numel() for parameter in paper.parameters()) == 4_276_739  # 4.28 M, as others count it


def test_an_image_does_not_depend_on_its_batch(generator):
    z = latents(7)
    images = generator(z)
    for i in (0, 3, 6):
        torch.testing.assert_close(generator(z[i : i + 1]), images[i : i + 1], rtol=0, atol=1e-5)


def test_built_frozen_and_differentiable_in_z(generator):
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    z = latents(4).requires_grad_()
    generator(z).square().sum().backward()
    assert z.grad.isfinite().all() and z.grad.norm(dim=1).gt(0).all()


def test_the_forward_is_the_papers_written_out(state, generator):
    """Every line of the block by functions: upsampling comes before the convolution, also in the shortcut."""
    f = torch.nn.functional

    def norm(x, name):
        stored = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return f.relu(f.batch_norm(x, *stored))

    def conv(x, name, padding=1):
        return f.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    z = latents(3)
    x = f.linear(z, state["linear.weight"], state["linear.bias"]).view(3, 6, 4, 4)
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        up = norm(x, f"{block}.norm1").repeat_interleave(2, 2).repeat_interleave(2, 3)
        hidden = conv(norm(conv(up, f"{block}.conv1"), f"{block}.norm2"), f"{block}.conv2")
        x = hidden + conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{block}.shortcut", padding=0)
    images = conv(norm(x, "norm"), "to_rgb").tanh()
    torch.testing.assert_close(generator(z), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "generator.", "module.generator.", "_orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_plain_state_dicts_load_with_and_without_prefixes(state, generator, tmp_path, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    named = {prefix + name: value for name, value in state.items()}
    save_file(named, path) if suffix == ".safetensors" else torch.save(named, path)
    assert generators.digest(generators.build("resnet-gan", str(path))) == generators.digest(generator)


@pytest.mark.parametrize(
    ("z", "error"),
    [
        (torch.zeros(2, 12, dtype=torch.long), TypeError),
        (torch.zeros(2, 12, dtype=torch.float64), TypeError),
        (torch.zeros(2, 13), ValueError),
        (torch.zeros(12), ValueError),
    ],
)
def test_other_latents_are_refused_by_name(generator, z, error):
    with pytest.raises(error, match="^z: expected"):
        generator(z)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda tensors: tensors.pop("blocks.1.conv2.bias"), "missing blocks.1.conv2.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda tensors: tensors.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \[3\], expected \[6\]"),
        (lambda tensors: tensors.pop("linear.weight"), "missing linear.weight"),
        (
            lambda tensors: tensors.update({"linear.weight": torch.zeros(95, 12)}),
            r"is \[95, 12\], expected \[16 W, L\]",
        ),
        (lambda tensors: tensors.update({"linear.weight": torch.zeros(0, 12)}), r"is \[0, 12\], expected \[16 W, L\]"),
        (lambda tensors: tensors.update({"module.extra": torch.zeros(1)}), "unexpected module.extra"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(state, tmp_path, fault, words):
    tensors = copy.copy(state)
    fault(tensors)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError, match=f"odd.safetensors.*{words}.*copgen_fast.generators.fit.resnet_gan --out DIR"):
        generators.build("resnet-gan", tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "is no state dict, but list"),
        ({}, "is no state dict"),
        ({"model": {"linear.weight": torch.zeros(1)}}, "no plain state dict: 'model' is dict, not a tensor"),
        ({"step": 3}, "no plain state dict: 'step' is int"),
        ({0: torch.zeros(1)}, "no plain state dict: 0 is no name"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=f"odd.pth.*{words}.*copgen_fast.generators.fit.resnet_gan"):
        generators.build("resnet-gan", tmp_path / "odd.pth")


def test_missing_or_truncated_weights_are_refused_with_the_remedy(state, tmp_path):
    with pytest.raises(
        UsageError, match="needs its weights.*copgen_fast.generators.fit.resnet_gan --out DIR.*--generator.weights"
    ):
        generators.build("resnet-gan")
    with pytest.raises(UsageError, match="none.pth are missing.*copgen_fast.generators.fit.resnet_gan"):
        generators.build("resnet-gan", tmp_path / "none.pth")
    for name in ("cut.safetensors", "cut.pth"):
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(UsageError, match=f"{name} is truncated.*copgen_fast.generators.fit.resnet_gan"):
            generators.build("resnet-gan", path)
