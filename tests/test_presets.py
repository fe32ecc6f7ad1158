"""Presets of the paper's settings: its numbers, computed from what the stages will do."""

import pytest

from copgen_fast import methods, registry
from copgen_fast.config import faults
from copgen_fast.doctor import estimates
from copgen_fast.errors import UsageError
from copgen_fast.evals.linear_augmented import Config, learning_rate
from copgen_fast.presets import PRESETS
from copgen_fast.train import main, parse, validate


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    assert not faults(PRESETS[name]) and parse([name]).out == f"runs/{name}"


@pytest.mark.parametrize(("name", "pairs", "epochs"), [("imagenet1k", 1_300_000, 100), ("imagenet100", 130_000, 200)])
def test_the_papers_numbers(name, pairs, epochs):
    config = PRESETS[name]
    navigator, pretrain = config.navigator, config.pretrain
    assert navigator.samples // navigator.batch == 1136
    assert (navigator.lr, navigator.estimator_lr, navigator.estimator.name) == (1e-5, 3e-5, "resnet18")
    assert (config.generator.name, config.pairs.count, pretrain.epochs) == ("bigbigan", pairs, epochs)
    assert pretrain.lr * pretrain.batch / 256 == pytest.approx(0.02625)
    assert (pretrain.encoder.name, pretrain.encoder.stem, pretrain.encoder.width) == ("resnet50", "imagenet", 64)
    options = registry.options("methods", config.method.name, config.method.options)
    assert (config.method.name, options.temperature, options.base_temperature) == ("simclr", 0.1, 0.07)
    assert methods.needs_labels(config.method.name) is False
    probe = registry.options_by_name("evals", config.probe.evals, config.probe.options)["linear-augmented"]
    assert probe == Config(epochs=60, lr=2.0) and config.data.image_size == 128
    assert learning_rate(probe, config.probe.batch, 60) == pytest.approx(0.014)


def test_the_doctor_estimates_the_presets():
    def samples(name):
        return PRESETS[name].pairs.count * PRESETS[name].pretrain.epochs

    assert (samples("imagenet1k"), samples("imagenet100")) == (estimates.PAIRS, estimates.PAIRS_100)
    assert PRESETS["imagenet1k"].navigator.samples == estimates.SAMPLES


def test_what_a_preset_still_needs_is_said_in_one_line(tmp_path, capsys):
    assert main(["imagenet100", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--data.root" in line or "--generator.weights" in line
    assert not (tmp_path / "run").exists()


def test_a_presets_options_of_parts_that_a_run_lacks_are_left_out():
    config = parse(["quickstart", "--pairs.positives", "gaussian", "--probe.evals", "knn"])
    assert config.pairs.options == ("gaussian.std=0.286",) and not faults(config)
    assert parse(["imagenet100", "--probe.evals", "knn"]).probe.options == ()
    given = ["steering.distance=1.5"]
    assert parse(["quickstart", "--positive.options", *given]).pairs.options == tuple(given), "given ones are kept"
    of_another = parse(["quickstart", "--pairs.positives", "gaussian", "--positive.options", *given])
    with pytest.raises(UsageError, match=r"steering.distance=1.5.*NAME one of gaussian"):
        validate(of_another)
