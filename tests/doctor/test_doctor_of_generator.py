"""The doctor's report on one generator."""

import json

import pytest
import torch
from PIL import Image

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.doctor import __main__, generator

CPU = torch.device("cpu")
FILE = """
import torch
from torch import nn

class G(nn.Module):
    latent_shape, image_shape, classes = (2, 3), (3, 8, 8), 3

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 192)

    def forward(self, z, labels):
        x = (self.layer(z.flatten(1)) + labels[:, None]).tanh().unflatten(1, (3, 8, 8))
        return {result}

def build(weights, config):
    torch.manual_seed(0)
    return G()
"""


@pytest.fixture
def write(tmp_path):
    def file(result="x"):
        (tmp_path / "my_gan.py").write_text(FILE.format(result=result))
        return str(tmp_path / "my_gan.py")

    return file


def test_it_prints_the_check_and_writes_samples(write, tmp_path, capsys):
    words = ["--quick", "--device", "cpu", "--grid", str(tmp_path / "grid.png"), "--json", str(tmp_path / "found.json")]
    assert __main__.main(["--generator", write(), "--generator.prior", "normal", *words]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "latents 2 x 3 (normal) -> images 3 x 8 x 8 of 3 classes" in said and "a gradient reaches z" in said
    assert found["check"]["differentiable"] and found["record"]["name"] == "my_gan" and "machine" not in said
    assert Image.open(tmp_path / "grid.png").size == (8 * 10 + 2, 4 * 10 + 2)
    assert __main__.main(["--generator", write("x.detach() * torch.rand(())"), *words]) == 2
    assert "the same latents give images that differ" in capsys.readouterr().err


@pytest.mark.parametrize(("result", "stages"), [("x", ["navigator", "pairs"]), ("x.detach()", ["pairs"])])
def test_it_estimates_the_stages_that_the_generator_allows(write, tmp_path, capsys, result, stages):
    config = GeneratorConfig(name=write(result))
    found = generator.examine(config, CPU, tmp_path / "grid.png", quick=False, seconds=0.01)
    assert [estimate["name"] for estimate in found["estimates"]] == stages
    assert all(estimate["hours"] > 0 for estimate in found["estimates"])
    said = capsys.readouterr().out
    assert "for 130,000 samples" in said and ("NO gradient reaches z" in said) == ("navigator" not in stages)


def test_a_built_in_one_is_checked_on_demand(capsys):
    G = generators.load(GeneratorConfig(), CPU)
    assert "latents" not in capsys.readouterr().out
    assert generators.check(G, GeneratorConfig(), CPU).images == "3 x 32 x 32"
