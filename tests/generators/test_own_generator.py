"""A generator of the user's own: a file outside the package, with the defaults and checks of `generators.build`."""

import hashlib

import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError

GENERATOR = '''
from dataclasses import dataclass

import torch
from torch import nn

class Linear(nn.Module):
    latent_dim, image_shape = 6, (3, 8, 8)

    def __init__(self, gain):
        super().__init__()
        self.layer = nn.Linear(6, 3 * 64, bias=False)
        self.gain = gain
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 6 * 3 * 64).view(-1, 6))

    def forward(self, z):
        return (self.gain * self.layer(z)).tanh().unflatten(1, (3, 8, 8))

@dataclass(frozen=True)
class Config:
    """Options."""

    gain: float = 1.0
    """Contrast."""

def build(weights, config):
    generator = Linear(config.gain)
    if weights is not None:
        generator.load_state_dict(torch.load(weights, weights_only=True))
    return generator
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_gan.py"
    path.write_text(GENERATOR)
    return path


def altered(file, old, new):
    assert old in GENERATOR
    file.write_text(GENERATOR.replace(old, new))
    return str(file)


def test_sizes_of_numpys_integers_become_ints(file):
    sizes = "latent_dim, image_shape = numpy.int64(6), numpy.array([3, 8, 8])"
    name = altered(file, "latent_dim, image_shape = 6, (3, 8, 8)", f"import numpy; {sizes}")
    generator = generators.build(name)
    assert (generator.latent_dim, generator.image_shape) == (6, (3, 8, 8))
    assert {type(size) for size in (generator.latent_dim, *generator.image_shape)} == {int}


def test_a_file_is_built_with_its_options_and_the_defaults(file):
    generator = generators.build(str(file), options=["gain=2"])
    assert (generator.latent_dim, generator.image_shape) == (6, (3, 8, 8))
    assert (generator.classes, generator.latent_groups, generator.weights_file) == (0, (), file)
    assert (generator.latent_shape, generator.prior) == ((6,), "truncnorm")
    assert not generator.training and not any(parameter.requires_grad for parameter in generator.parameters())
    z = torch.linspace(-0.2, 0.2, 18).view(3, 6).requires_grad_()
    plain = generators.build(str(file))
    torch.testing.assert_close(generator(z).atanh(), 2 * plain(z, None).atanh())
    assert torch.autograd.grad(generator(z).sum(), z)[0].abs().min() > 0
    with pytest.raises(ValueError, match="labels: expected none"):
        generator(z, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="option 'gains' of my_gan .*choose from gain"):
        generators.build(str(file), options=["gains=2"])


def test_a_module_on_the_path_is_built(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    file.rename(file.with_name("my_models_gan.py"))
    (file.parent / "my_models").mkdir()
    file.with_name("my_models_gan.py").rename(file.parent / "my_models" / "gan.py")
    assert generators.build("my_models.gan").latent_dim == 6


def test_its_weights_are_recorded_with_what_was_made_of_them(file, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    state = generators.build(str(file)).generator.state_dict()
    torch.save({name: value / 2 for name, value in state.items()}, weights)
    config = GeneratorConfig(name=str(file), weights=str(weights), options=("gain=0.5",))
    record = generators.load(config, torch.device("cpu")).record
    assert record["name"] == "my_gan" and record["weights"] == str(weights) and record["options"] == {"gain": 0.5}
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["sha256"] in capsys.readouterr().out
    without = generators.load(GeneratorConfig(name=str(file)), torch.device("cpu")).record
    assert without["weights"] == str(file) and without["digest"] != record["digest"] and without["options"] == {}


def test_a_conditional_one_gets_labels_and_groups(file):
    name = altered(file, "def forward(self, z):", "classes, latent_groups = 2, (2, 4)\n\n    def forward(self, z, c):")
    generator = generators.build(name)
    assert (generator.classes, generator.latent_groups) == (2, (2, 4))
    assert generator(torch.zeros(2, 6), torch.tensor([0, 1])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("level", ["exact", "half"])
def test_it_is_drawn_at_every_level(file, level):
    generator = generators.load(GeneratorConfig(name=str(file), level=level), torch.device("cpu"))
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert generator.latent_groups == () and generator(z).shape == (3, 3, 8, 8)
    torch.testing.assert_close(
        generator(z), generators.build(str(file))(z), rtol=0, atol=0 if level == "exact" else 0.1
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def build(", "def make(", r"has no function build\(weights, config\)"),
        ("return generator", "return 3", "build must return a torch.nn.Module, got int"),
        ("latent_dim, image_shape = 6, (3, 8, 8)", "latent_dim = 0", "latent_dim: expected .*1 or more, got 0"),
        ("latent_dim, image_shape = 6, (3, 8, 8)", "latent_shape = 6, 'x'", "latent_shape: expected .*got .6, 'x'"),
        ("= 6, (3, 8, 8)", "= 6, (2, 8, 8)", r"image_shape: expected \(3, height, width\), got \(2, 8, 8\)"),
        ("def forward", "classes = -1\n    def forward", "classes: expected .*, got -1"),
        ("def forward", "latent_groups = 2, 3\n    def forward", r"latent_groups: .*sum to latent_dim 6, got \(2, 3\)"),
        ("= 6, (3, 8, 8)", "= 7, (3, 8, 8)", r"images of latents \[2, 7\]: RuntimeError: mat1 and mat2"),
        ("= 6, (3, 8, 8)", "= 6, (3, 4, 16)", r"images \[2, 3, 4, 16\] in \[-1, 1\], got shape \[2, 3, 8, 8\]"),
        (".tanh()", ".mul(torch.nan)", "got NaN or infinity"),
        (".tanh()", ".tanh().add(1).mul(127.5).to(torch.uint8)", "got torch.uint8"),
        (".tanh()", ".tanh().mul(127.5)", "got values from -127.* to 127.*: scale or clamp them"),
        ("return (self", "return None and (self", "got NoneType"),
        (".tanh()", ".tanh().to('meta')", "on cpu as the latents, got them on meta"),
    ],
)
def test_a_module_that_is_no_generator_is_refused(file, old, new, message):
    with pytest.raises(UsageError, match=f"^generators? {file}:? .*{message}"):
        generators.build(altered(file, old, new))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"RuntimeError: two lines \(line 30 of my_gan.py\); it was given no weights \(--generator.weights FILE\)",
        ),
        (b"hello", "weights.pt is truncated, altered or no checkpoint"),
        (b"<html>", "weights.pt is a web page and not the file: download what the page links to"),
        ({"a": torch.ones(2)}, r"Missing key.*\(line 32 of my_gan.py\); .*weights.pt holds 1 tensors: a \[2\]"),
        (b"cposix\nsystem\n(S'true'\ntR.", "weights.pt was refused: it names posix.system, which runs code"),
    ],
)
def test_a_build_that_fails_says_where_and_what_the_weights_hold(file, content, message):
    name, weights = altered(file, "    if weights is not None", FAILS), file.with_name("weights.pt")
    if isinstance(content, bytes):
        weights.write_bytes(content)
    elif content is not None:
        torch.save(content, weights)
    with pytest.raises(UsageError, match=f"^generator {name}: its build fails with .*{message}") as refused:
        generators.build(name, weights if weights.exists() else None)
    assert len(str(refused.value).splitlines()) == 1


FAILS = """    if weights is None:
        raise RuntimeError("two\\nlines")
    if weights is not None"""
