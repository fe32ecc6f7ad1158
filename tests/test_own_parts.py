"""A generator, positives, a method and an evaluation of the user's own: four files outside the package, one command."""

import json

import pytest

from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.train import main
from copgen_fast.verify import main as verify

GENERATOR = '''
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    brightness: float = 0.5
    """Largest value of an image."""


class Stripes(nn.Module):
    latent_dim, image_shape = 6, (3, 16, 16)

    def __init__(self, brightness):
        super().__init__()
        self.brightness = brightness
        self.register_buffer("waves", torch.linspace(0, 6, 16 * 16).view(1, 16, 16).repeat(6, 1, 1).sin())

    def forward(self, z):
        grey = torch.tanh(torch.einsum("nl,lhw->nhw", z, self.waves)) * self.brightness
        return grey[:, None].expand(-1, 3, -1, -1)


def build(weights, config):
    return Stripes(config.brightness)
'''
POSITIVE = """
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    step: float = 0.5


def build(setting):
    return lambda z, seeds: z + setting.options.step * torch.ones(setting.latent_dim)
"""
METHOD = '''
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast.methods import Method


@dataclass(frozen=True)
class Config:
    width: int = 8


class Cosine(Method):
    """Negative cosine similarity of both views to a slowly moving mean of the embeddings."""

    def __init__(self, encoder, config):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.feature_dim, config.width)
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, v):
        return (self.head(self.encoder(v)),)

    def targets(self, v):
        return (self.mean.clone(),)

    def loss(self, online, targets, labels, group):
        anchors, positives = online[0].float().chunk(2)
        near = F.cosine_similarity(anchors, positives).mean()
        return F.cosine_similarity(online[0] - targets[0], targets[0][None]).mean() * 0.1 - near

    def after_step(self, online, targets, progress):
        self.mean.lerp_(online[0].mean(0), 0.1)
        self.progress.fill_(progress)


def build(encoder, config):
    return Cosine(encoder, config)
'''
EVALUATION = """
from dataclasses import dataclass

from copgen_fast.evals import freeze, labelled_images


@dataclass(frozen=True)
class Config:
    images: int = 10


def evaluate(encoder, config, run):
    features = freeze(encoder, run).features(labelled_images(run).test_images)[: config.images]
    return {"largest_feature": float(features.abs().max()), "images_seen": len(features)}
"""
FILES = {"my_gan": GENERATOR, "my_positive": POSITIVE, "my_method": METHOD, "my_eval": EVALUATION}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    part = {name: str(folder / f"{name}.py") for name in FILES}
    return folder, [
        *("quickstart", "--device", "cpu", "--log-every", "1", "--out", str(folder / "run"), "--data.image-size", "16"),
        *("--generator.name", part["my_gan"], "--generator.options", "brightness=0.75"),
        *("--pairs.positives", part["my_positive"], "--positive.options", "my_positive.step=0.25"),
        *("--method", part["my_method"], "--method.options", "width=5"),
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
    index = json.loads((run / "pairs" / "my_positive" / "index.json").read_text())["identity"]
    assert (index["generator"], index["positive"], index["step"], index["brightness"]) == (
        "my_gan",
        "my_positive",
        0.25,
        0.75,
    )
    assert len(PairDataset(run / "pairs" / "my_positive")) == 16
    assert (run / "pretrain" / "my_positive" / "my_method" / "encoder.safetensors").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["probe.my_positive.images_seen"] == metrics["probe.random.images_seen"] == 7
    assert metrics["probe.my_positive.largest_feature"] > 0 and "pretrain.my_positive.loss" in metrics
    page = (run / "report.html").read_text()
    assert "largest feature" in page and "my_positive" in page


def test_their_options_and_their_files_are_recorded(run, command):
    record = json.loads((run / "config.json").read_text())
    assert record["generator.options.brightness"] == 0.75 and record["method.options.width"] == 5
    assert record["positive.options.my_positive.step"] == 0.25 and record["evals.options.my_eval.images"] == 7
    assert sum(name.endswith(".sha256") for name in record) == 4


def test_their_pairs_are_made_again_from_their_seeds(run, capsys):
    assert verify([str(run), "--device", "cpu"]) == 0
    assert "my_positive: 2 shards as recorded; 16 pairs made again" in capsys.readouterr().out


def test_the_same_command_does_nothing_again_and_a_changed_file_is_another_run(run, command, capsys):
    folder, arguments = command
    before = (run / "pretrain" / "my_positive" / "my_method" / "encoder.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (run / "pretrain" / "my_positive" / "my_method" / "encoder.safetensors").read_bytes() == before
    path = folder / "my_method.py"
    path.write_text(METHOD + "\n# changed\n")
    try:
        assert main(arguments) == 2
        assert "my_method.py.sha256" in capsys.readouterr().err
    finally:
        path.write_text(METHOD)
