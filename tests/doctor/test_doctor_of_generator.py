"""The doctor's report on one generator."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from copgen_fast import generators
from copgen_fast.config import EncoderConfig, GeneratorConfig
from copgen_fast.doctor import __main__, generator, online

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


@pytest.mark.parametrize(("result", "first"), [("x", ["navigator"]), ("x.detach()", [])])
def test_it_estimates_the_stages_that_the_generator_allows(write, tmp_path, capsys, result, first):
    small = EncoderConfig("resnet18", width=8)
    found = generator.examine(GeneratorConfig(name=write(result)), CPU, tmp_path / "grid.png", False, 0.01, small)
    assert [estimate["name"] for estimate in found["estimates"]] == [*first, "pairs", "pretrain"]
    assert all(estimate["hours"] > 0 for estimate in found["estimates"])
    said = capsys.readouterr().out
    assert "for 130,000 samples" in said and "for 13,000,000 samples" in said
    assert "pairs, 100 epochs of 130,000 pairs" in said and found["online"]["cores"] >= 1
    assert found["online"]["disk"] == 130_000 * found["online"]["stored"] > 0
    assert ("NO gradient reaches z" in said) == (not first)


RATES = online.Rates(
    generate=0.002, step=0.01, encode=0.004, decode=0.03, stored=5e4, decoded=2 * 49152, cores=2, beside=False
)


@pytest.mark.parametrize(
    ("changes", "cached", "write", "shards", "drawn"),
    [
        ({}, False, 4, 25, 12),  # the cores decode for 15 of these, in every epoch
        ({}, True, 4, 11.5, 12),  # or in the first of ten alone
        ({"beside": True}, False, 2, 15, 12),  # beside the step, which waits for them
        ({"beside": True, "cores": 4}, False, 2, 10, 12),
        ({"beside": True, "generate": 0.02}, False, 20, 15, 30),
    ],
)
def test_shards_are_compared_with_online_by_their_rates(changes, cached, write, shards, drawn):
    rates = replace(RATES, **changes)
    found = online.compare(rates, 1000, 10, "png", cache_bytes=1e9 if cached else 1e6)
    assert (found.write, found.shards_epoch, found.online_epoch) == pytest.approx((write, shards, drawn))
    assert found.disk == 5e7 and found.shards == pytest.approx(write + 10 * shards) and found.online == 10 * drawn


def test_the_faster_one_is_named_and_by_how_much():
    slow = online.Comparison(1000, 10, "png", 600, 3600, 7200, 3e9)
    verdict, *ways = str(slow).splitlines()
    assert verdict.strip().startswith("pairs, 10 epochs of 1,000 pairs: 10.2 h on shards, 20.0 h online; ")
    assert verdict.endswith("; shards are 1.97 times as fast (saves 9.8 h)")
    assert ways == [
        "    shards: 10 min and 3 GB to write them once as png, then 60 min an epoch",
        "    online: no disk, 2.0 h an epoch",
    ]
    assert str(replace(slow, online_epoch=3600)).splitlines()[0].endswith("online is no faster by 5 % (saves 10 min)")


@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_rates_are_measured_with_each_codec(codec):
    G = generators.load(GeneratorConfig(), CPU)
    rates = online.measured(G(G.sample(0, 4)), generate=1.0, step=2.0, cores=3, codec=codec)
    assert rates.encode > 0 and rates.decode > 0 and rates.decoded == 2 * 3 * 32 * 32 and not rates.beside
    assert (rates.stored == rates.decoded) if codec == "raw" else (0 < rates.stored < rates.decoded)


def test_a_built_in_one_is_checked_on_demand(capsys):
    G = generators.load(GeneratorConfig(), CPU)
    assert "latents" not in capsys.readouterr().out
    assert generators.check(G, GeneratorConfig(), CPU).images == "3 x 32 x 32"
