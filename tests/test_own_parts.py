"""A generator, positives, a method and an evaluation of the user's own: four files outside the package, one command.

The first three are those that the documentation shows.
"""

import json

import pytest
import torch
from torch import nn

from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.train import main
from copgen_fast.verify import main as verify
from tests.docs.pages import ROOT, write_files

EVALUATION = """
from dataclasses import dataclass

from copgen_fast.evals import freeze, real_images


@dataclass(frozen=True)
class Config:
    images: int = 10


def evaluate(encoder, config, run):
    features = freeze(encoder, run).split_features(real_images(run), "test").features[: config.images]
    return {"largest_feature": float(features.abs().max()), "images_seen": len(features)}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for page in ("your-generator", "methods"):
        write_files(ROOT / "docs" / f"{page}.md", folder)
    (folder / "my_eval.py").write_text(EVALUATION)
    layers = {"body": nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3 * 32 * 32))}
    torch.save(nn.ModuleDict(layers).state_dict(), folder / "weights.pth")
    part = {name: str(folder / f"{name}.py") for name in ("my_gan", "shrink", "my_method", "my_eval")}
    return folder, [
        *("quickstart", "--device", "cpu", "--log-every", "1", "--out", str(folder / "run"), "--data.image-size", "16"),
        *("--generator.name", part["my_gan"], "--generator.options", "width=16"),
        *("--generator.weights", str(folder / "weights.pth")),
        *("--pairs.positives", part["shrink"], "--positive.options", "shrink.factor=0.25"),
        *("--method", part["my_method"], "--method.options", "weight=0.5"),
        *("--probe.evals", part["my_eval"], "--evals.options", "my_eval.images=7", "--probe.baselines", "random"),
        *("--navigator.samples", "16", "--navigator.batch", "8", "--pairs.count", "16", "--pairs.shard-size", "8"),
        *("--pretrain.epochs", "2", "--pretrain.batch", "8"),
    ]


@pytest.fixture(scope="module")
def run(command):
    folder, arguments = command
    assert main(arguments) == 0
    return folder / "run"


def test_four_files_run_the_whole_pipeline(run):
    index = json.loads((run / "pairs" / "shrink" / "index.json").read_text())["identity"]
    assert (index["generator"], index["positive"], index["factor"], index["width"]) == ("my_gan", "shrink", 0.25, 16)
    assert len(PairDataset(run / "pairs" / "shrink")) == 16
    assert (run / "pretrain" / "shrink" / "my_method" / "encoder.safetensors").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["probe.shrink.images_seen"] == metrics["probe.random.images_seen"] == 7
    assert metrics["probe.shrink.largest_feature"] > 0 and "pretrain.shrink.loss" in metrics
    page = (run / "report.html").read_text()
    assert "largest feature" in page and "shrink" in page


def test_their_options_and_their_files_are_recorded(run, command):
    record = json.loads((run / "config.json").read_text())
    assert record["generator.options.width"] == 16 and record["method.options.weight"] == 0.5
    assert record["positive.options.shrink.factor"] == 0.25 and record["evals.options.my_eval.images"] == 7
    assert sum(name.endswith(".py.sha256") for name in record) == 4 and "generator.weights.sha256" in record


def test_their_pairs_are_made_again_from_their_seeds(run, capsys):
    assert verify([str(run), "--device", "cpu"]) == 0
    assert "shrink: 2 shards as recorded; 16 pairs made again" in capsys.readouterr().out


def test_the_same_command_does_nothing_again_and_a_changed_file_is_another_run(run, command, capsys):
    folder, arguments = command
    before = (run / "pretrain" / "shrink" / "my_method" / "encoder.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (run / "pretrain" / "shrink" / "my_method" / "encoder.safetensors").read_bytes() == before
    path = folder / "my_method.py"
    method = path.read_text()
    path.write_text(method + "\n# changed\n")
    try:
        assert main(arguments) == 2
        assert "my_method.py of sha256" in capsys.readouterr().err
    finally:
        path.write_text(method)
