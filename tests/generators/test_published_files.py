"""The two published GANs that the documentation shows, with their weights where the folder $COPGEN_WEIGHTS has them."""

import os
from pathlib import Path

import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from tests.docs.pages import ROOT, blocks, write_files

PAGE = ROOT / "docs" / "your-generator.md"
FILES = {"mnist_mlp.py": "mnist_mlp.pth", "small_dcgan.py": "cifar10_dcgan.pth"}


@pytest.fixture
def load(tmp_path):
    def load(name):
        weights = Path(os.environ.get("COPGEN_WEIGHTS", "/nowhere")) / FILES[name]
        if not weights.exists():
            pytest.skip(f"set COPGEN_WEIGHTS to a folder with {weights.name}")
        write_files(PAGE, tmp_path)
        config = GeneratorConfig(name=str(tmp_path / name), weights=str(weights))
        return generators.load(config, torch.device("cpu")), weights

    return load


@pytest.mark.parametrize("name", FILES)
def test_it_takes_twelve_lines(name):
    (block,) = (block for block in blocks(PAGE, "python") if block.file == name)
    assert len([line for line in block.code.splitlines() if line.strip()]) <= 12


def test_mnists_perceptron_draws_strokes_on_black(load):
    G, _ = load("mnist_mlp.py")
    images = G(G.sample(0, 64))
    assert (G.latent_dim, G.prior, images.shape, G.differentiable) == (64, "normal", (64, 3, 28, 28), True)
    assert images[:, :, :3].mean() < -0.95 and images.amax((1, 2, 3)).min() > 0.9


def test_cifar10s_dcgan_is_the_built_in_one(load):
    G, weights = load("small_dcgan.py")
    z = G.sample(0, 4)
    torch.testing.assert_close(G(z), generators.build("cifar10-dcgan", weights)(z))
