import copy

import pytest
import torch
from safetensors.torch import save_file

from copgen_fast import generators
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


def test_sizes_are_those_of_the_file_and_the_papers_by_default(generator):
    assert (generator.latent_dim, generator.width) == (12, 6)
    with torch.device("meta"):
        paper = ResnetGAN()
    assert (paper.latent_dim, paper.width) == (128, 256)
    assert sum(parameter.numel() for parameter in paper.parameters()) == 4_276_739  # 4.28 M, as others count it


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
    ("fault", "words"),
    [
        (lambda tensors: tensors.pop("linear.weight"), "missing linear.weight"),
        (
            lambda tensors: tensors.update({"linear.weight": torch.zeros(95, 12)}),
            r"is \[95, 12\], expected \[16 W, L\]",
        ),
        (lambda tensors: tensors.update({"linear.weight": torch.zeros(0, 12)}), r"is \[0, 12\], expected \[16 W, L\]"),
        (lambda tensors: tensors.update({"module.extra": torch.zeros(1)}), "unexpected extra"),
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
        ([1, 2], "holds a list without tensors"),
        ({}, "holds a dict without tensors"),
        ({"model": {"linear.weight": torch.zeros(1)}}, r"holds 1 tensors: model.linear.weight \[1\]; expected"),
        ({"step": 3}, r"holds a dict without tensors .step."),
        ({0: torch.zeros(1)}, r"holds 1 tensors: 0 \[1\]; expected .* tensors: blocks"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=f"odd.pth.*{words}.*copgen_fast.generators.fit.resnet_gan"):
        generators.build("resnet-gan", tmp_path / "odd.pth")
