"""Modules of any form as generators: latents of any shape, images of any range, in tuples or dicts, grey; priors."""

import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError
from copgen_fast.runtime import latents

CPU = torch.device("cpu")
MODULE = """
import torch
from torch import nn

class G(nn.Module):
    {declared}

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear({inputs}, 3 * 64, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, {inputs} * 3 * 64).view(-1, {inputs}))

    def forward(self, z{labels}):
        x = self.layer({z}).tanh().unflatten(1, (3, 8, 8))
        return {result}

def build(weights, config):
    return G()
"""


@pytest.fixture
def write(tmp_path):
    def file(declared="pass", inputs=6, labels="", z="z", result="x"):
        path = tmp_path / "my_gan.py"
        path.write_text(MODULE.format(declared=declared, inputs=inputs, labels=labels, z=z, result=result))
        return str(path)

    return file


def expected(z, grey):
    images = (z @ torch.linspace(-1, 1, 6 * 3 * 64).view(-1, 6).T).tanh().unflatten(1, (3, 8, 8))
    return images[:, :1].expand(-1, 3, -1, -1) if grey else images


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"declared": "latent_dim = 6"},
        {"declared": "latent_shape = 6, 1, 1", "z": "z[:, :, 0, 0]"},
        {"declared": "latent_shape = [2, 3]", "z": "z.flatten(1)"},
        {"declared": "latent_dim, latent_shape = 6, (2, 3)"},
        {"result": "x[:, :1]"},
        {"result": "x[:, :1]", "declared": "image_shape = 1, 8, 8"},
        {"result": "(x + 1) / 2", "declared": "image_range = 0, 1"},
        {"result": "z, x, x.flatten(1)"},
        {"result": "x.double()"},
        {"result": "dict(logits=z, images=x)"},
        {"result": "dict(small=x[..., :4, :4], images=x)", "declared": "image_key = 'images'"},
        {"result": "[x[..., :4, :4], x]", "declared": "image_key = 1"},
        {"labels": ", labels"},
        {"labels": ", c", "declared": "classes = 2", "result": "x if c.dtype == torch.int64 else None"},
        {"declared": "sample = staticmethod(lambda seed, n: torch.full((n, 6), 0.1))"},
    ],
)
def test_every_form_gives_the_same_images(write, form):
    generator = generators.build(write(**form))
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = generator(z, torch.arange(3) % 2 if generator.classes else None)
    torch.testing.assert_close(images, expected(z, grey="[:, :1]" in form.get("result", "")))
    assert torch.autograd.grad(images.sum(), z)[0].ne(0).all()
    assert (generator.latent_dim, generator.image_shape) == (6, (3, 8, 8))
    assert generator(z[:0], torch.zeros(0, dtype=torch.int64) if generator.classes else None).shape == (0, 3, 8, 8)


def test_a_latent_shape_beside_latent_dim_says_what_flat_latents_stand_for(write):
    assert generators.build(write("latent_dim, latent_shape = 6, (1, 2, 3)")).latent_shape == (1, 2, 3)
    assert generators.build(write("latent_shape = 6, 1, 1", z="z.flatten(1)")).latent_shape == (6, 1, 1)


@pytest.mark.parametrize("prior", ["normal", "uniform", "sphere"])
def test_latents_come_from_the_prior_that_it_names_or_the_configured_one(write, prior):
    named, plain = write(f"prior = '{prior}'"), GeneratorConfig(name=write())
    drawn = generators.load(GeneratorConfig(name=write(f"prior = '{prior}'")), CPU)
    assert drawn.record["prior"] == drawn.prior == prior
    torch.testing.assert_close(drawn.sample(3, 4), latents.sample(prior, 3, (4, 6)), rtol=0, atol=0)
    configured = generators.load(GeneratorConfig(name=named, prior="truncnorm"), CPU)
    assert configured.prior == "truncnorm" and configured.sample(3, 4).equal(latents.sample("truncnorm", 3, (4, 6)))
    assert plain.prior is None


def test_its_own_sample_draws_for_every_stage(write):
    draw = "sample = staticmethod(lambda seed, n: torch.arange(6.0).view(2, 3).expand(n, 2, 3) + seed)"
    config = GeneratorConfig(name=write(draw, z="z.flatten(1)"), level="half")
    generator = generators.load(config, CPU)
    assert generator.record["prior"] == "own" and generator.latent_shape == (2, 3)
    assert generator.sample(2, 3).equal(torch.arange(6.0).expand(3, 6) + 2)
    assert latents.each(generator.sample, [1, 2]).equal(torch.arange(6.0) + torch.tensor([[1], [2]]))
    with pytest.raises(UsageError, match="generator.prior: .*my_gan.py draws its latents itself: leave it out"):
        generators.load(GeneratorConfig(name=config.name, prior="normal"), CPU)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"z": "z[:, :5]"}, "latent_dim: expected .*, or latent_shape, got neither, and no shape .* declare one"),
        ({"declared": "latent_shape = 6, 'x'"}, r"latent_shape: expected sizes, 1 or more each, got \(6, 'x'\)"),
        ({"declared": "latent_dim, latent_shape = 6, (2, 2)"}, r"latent_shape: .* product is 6, got \(2, 2\)"),
        ({"declared": "prior = 'gumbel'"}, "prior: expected one of truncnorm, normal, .*got 'gumbel'"),
        ({"declared": "image_range = 0, 255"}, r"image_range: expected \(-1, 1\) or \(0, 1\), got \(0, 255\)"),
        ({"result": "x.abs()"}, r"got values from 0.* to 0.*: declare image_range as \(0, 1\) or \(-1, 1\)"),
        ({"declared": "sample = lambda self, *_: 3", "inputs": 6}, r"sample\(0, 1\): expected .* got int"),
        (
            {"declared": "sample, latent_dim = lambda self, *_: torch.ones(1), 6"},
            r"sample\(0, 2\): .* of 2 x 6 numbers",
        ),
        (
            {"result": "dict(image=1)", "declared": "latent_dim = 6"},
            r"a dict of \['image'\], with 0 images: set image_key",
        ),
        ({"result": "(x, x)", "declared": "latent_dim = 6"}, r"a tuple of \[0, 1\], with 2 images: set image_key"),
        (
            {"result": "(x, x)", "declared": "latent_dim, image_key = 6, 2"},
            r"image_key: 2 is not in a tuple of \[0, 1\]",
        ),
        ({"result": "torch.cat([x, x], 1)", "declared": "image_shape = 3, 8, 8"}, r"got shape \[2, 6, 8, 8\]"),
        ({"declared": "image_range = 1"}, r"image_range: expected \(-1, 1\) or \(0, 1\), got 1$"),
        ({"declared": "sample = lambda self, n: torch.ones(n, 6)"}, r"sample\(0, 1\): TypeError: .* 2 positional"),
        (
            {"declared": "latent_dim = 6\n    def sample(self, seed, n): raise OSError('no\\nfile')"},
            r"sample\(0, 2\): OSError: no file \(line 7 of my_gan.py\)$",
        ),
        (
            {
                "labels": ", y",
                "declared": "latent_dim, classes = 6, 9",
                "result": "torch.ones(5)[y, None, None, None] * x",
            },
            r"images of latents \[2, 6\] and labels \[0, 8\]: IndexError: .*\(line 16 of my_gan.py\)$",
        ),
        (
            {"labels": ", labels", "declared": "latent_dim = 6", "result": "x * torch.ones(5)[labels.tolist()]"},
            "its forward takes labels: declare classes, their number",
        ),
        (
            {"declared": "latent_dim = 6\n    __call__ = lambda self, z: self.double().forward(z)"},
            r"its weights are torch.float64 and latents torch.float32: return it as float32, G.float\(\)",
        ),
        ({"result": "(x, x)"}, r"no shape of its first layers .*: declare one \(images of .* with 2 images: set"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_a_line(write, form, message):
    with pytest.raises(UsageError, match=f"^generator .*my_gan.py: .*{message}") as refused:
        generators.build(write(**form))
    assert "\n" not in str(refused.value)
