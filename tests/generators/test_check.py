"""The check of generators that are not the package's own: what it says, and what it refuses in one line."""

import dataclasses

import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.stages import Run, navigator, steering

CPU = torch.device("cpu")
MODULE = """
import torch
from torch import nn

class G(nn.Module):
    latent_dim = 6
    {declared}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), {norm}, nn.Linear(8, 3 * 64)

    def forward(self, z):
        x = self.last(self.norm(self.first(z))).tanh().unflatten(1, (3, 8, 8))
        return {result}

def build(weights, config):
    return G()
"""


@pytest.fixture
def write(tmp_path):
    def config(declared="pass", norm="nn.ReLU()", result="x"):
        path = tmp_path / "my_gan.py"
        path.write_text(MODULE.format(declared=declared, norm=norm, result=result))
        return GeneratorConfig(name=str(path))

    return config


def test_it_says_in_two_lines_what_it_found_once_a_process(write, capsys):
    config = write("latent_shape = 6, 1, 1", result="x[:, :1]")
    assert generators.load(config, CPU).differentiable
    lines = [line for line in capsys.readouterr().out.splitlines() if "sha256" not in line]
    assert len(lines) == 2 and all(line.startswith("generator my_gan: ") for line in lines)
    assert "latents 6 x 1 x 1 (truncnorm) -> images 3 x 8 x 8, values -" in lines[0]
    assert "repeatable" in lines[1] and "a gradient reaches z" in lines[1] and lines[1].endswith("ms an image")
    generators.load(config, CPU)
    assert "latents" not in capsys.readouterr().out
    generators.load(GeneratorConfig(), CPU)
    assert "latents" not in capsys.readouterr().out  # the package's own are tested


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"norm": "nn.BatchNorm1d(8, track_running_stats=False)"}, r"another batch, from layer norm \(BatchNorm1d\)"),
        ({"result": "x - x.mean(0)"}, "an image differs by .* in another batch: each must depend on its own latent"),
        ({"norm": "type('Noise', (nn.Module,), dict(forward=lambda s, x: x + torch.rand(())))()"},
         r"the same latents give images that differ by .*, from layer norm \(Noise\) on: draw its noise once"),
        ({"result": "x * torch.rand(())"}, "the same latents give images that differ by [0-9.]+: draw"),
        ({"result": "x + 1e-6 * torch.rand(())"}, "images that differ by .*e-0.: draw its noise"),
        ({"result": "x.view(2, 3, 8, 8)"}, r"latents \[4, 6\]: RuntimeError: .*my_gan.py\): two went well"),
        ({"result": "x / (len(z) < 4)"}, r"images of latents \[4, 6\]: NaN or infinity"),
        ({"result": "0 * x - 0.5"}, "other latents give the same images: its forward must depend on z"),
        ({"declared": "import random; sample = lambda self, seed, n: torch.ones(n, 6) * self.random.random()"},
         r"sample\(0, 4\) gives other latents at each call"),
    ],
)  # fmt: skip
def test_what_no_stage_can_use_is_refused_with_the_layer(write, form, message):
    with pytest.raises(UsageError, match=f"^generator .*my_gan.py: .*{message}"):
        generators.load(write(**form), CPU)


@pytest.mark.parametrize("result", ["x.detach()", "x.sign() + 0 * x", "(4 * x).round() / 4"])
@pytest.mark.parametrize(("stage", "name"), [(navigator, "navigator"), (steering, "steering")])
def test_without_a_gradient_to_z_learning_stages_refuse_and_pairs_do_not(write, tmp_path, result, stage, name):
    config = dataclasses.replace(PRESETS["quickstart"], generator=write(result=result))
    with pytest.raises(UsageError, match=f"my_gan.py: no gradient reaches z, and {name} learns by it"):
        stage.run(Run(config, tmp_path / "run", CPU))
    assert not generators.load(config.generator, CPU).differentiable
