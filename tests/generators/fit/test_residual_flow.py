import json

import numpy as np
import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import DataConfig
from copgen_fast.errors import NonFiniteError
from copgen_fast.generators.fit import residual_flow
from copgen_fast.generators.fit.fitting import one_thread
from copgen_fast.generators.fit.residual_flow import FlowConfig
from copgen_fast.images import sets

TINY = ["--steps", "3", "--batch", "16", "--blocks", "2", "--width", "24"]


@pytest.fixture(scope="module", autouse=True)
def one_draw():
    """Reports from one dequantisation: what takes the time of a fit this short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_flow, "DRAWS", 1)
        yield


@pytest.fixture(scope="module")
def fitted(one_draw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "new"
    assert residual_flow.main(["--out", str(folder), *TINY]) == 0
    return folder


def test_the_report_holds_bits_and_errors(fitted):
    found = json.loads((fitted / "residual_flow.json").read_text())
    assert 0 < found["train_bits_per_dim"] < found["held_out_bits_per_dim"] < 4.1
    assert found["latent_mean"] <= found["latent_max"] < 1e-3 and found["scan_mean"] <= found["scan_max"] < 1e-4


@pytest.mark.parametrize("log_det", ["estimate", "exact"])
def test_training_lowers_the_bits_of_both_splits(tmp_path, log_det):
    grey, held_out, levels = residual_flow.load_levels(DataConfig("digits", image_size=8))
    config = FlowConfig(tmp_path, batch=32, blocks=2, width=32, lr=2e-2, log_det=log_det)
    found = {}
    for steps in (1, 40):
        with torch.random.fork_rng(), one_thread():
            torch.manual_seed(0)
            model = residual_flow.train(FlowConfig(**vars(config) | {"steps": steps}), grey, levels)
        found[steps] = [residual_flow.mean_bits(model, part[:200], 0) for part in (grey, held_out)]
        assert all(block.lipschitz() < 1 for block in model.flow.blocks)
    assert all(late < early - 0.01 for early, late in zip(found[1], found[40], strict=True)), found


def test_estimated_bits_agree_with_exact_ones(fitted, monkeypatch):
    model = generators.build("residual-flow", fitted / "residual_flow.safetensors")
    _, held_out, _ = residual_flow.load_levels(DataConfig("digits", image_size=8))
    exact = residual_flow.mean_bits(model, held_out, 0)
    monkeypatch.setattr(residual_flow, "EXACT_UP_TO", 1)
    assert residual_flow.mean_bits(model, held_out, 0) == pytest.approx(exact, abs=0.02)


def test_only_the_training_split_is_seen_and_levels_are_the_scans_own():
    train, test, levels = residual_flow.load_levels(DataConfig("digits", image_size=8))
    assert train.shape == (1437, 8, 8) and test.shape == (360, 8, 8) and levels == 17
    assert train.min() == 0 and train.max() == 16
    images = sets.digits(8).test_images[:, 0].double() / 255 * 16
    torch.testing.assert_close(test.double(), images, rtol=0, atol=0.04)


def test_jitter_moves_images_a_little_and_gives_levels():
    torch.manual_seed(0)
    grey, _, _ = residual_flow.load_levels(DataConfig("digits", image_size=8))
    moved = residual_flow.jitter(grey, 16, 1.6)
    assert torch.equal(moved, moved.round().clamp(0, 16)) and moved.shape == grey.shape
    assert 0.05 < (moved - grey).flatten(1).norm(dim=1).mean() / grey.flatten(1).norm(dim=1).mean() < 0.5
    assert torch.equal(residual_flow.jitter(grey, 16, 0), grey)


def test_an_npz_of_another_size_can_be_fitted(tmp_path):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (40, 12, 12, 1), np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    where = ["--data.name", "npz", "--data.root", str(tmp_path / "x.npz"), "--data.image-size", "12"]
    assert residual_flow.main(["--out", str(tmp_path / "out"), *TINY, *where]) == 0
    generator = generators.build("residual-flow", tmp_path / "out" / "residual_flow.safetensors")
    assert generator.latent_dim == 144 and generator.levels == 256
    assert generator(torch.zeros(2, 144)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--width", "0"], "--width: expected 1 to 4096, got 0"),
        (["--lr", "0"], "--lr: expected 1e-12 to 1000, got 0"),
        (["--temperature", "nan"], "--temperature: expected 0.001 to 1000, got nan"),
        (["--jitter", "-1"], "--jitter: expected 0 to 100, got -1"),
        (["--data.image-size", "64"], "--data.image-size: expected 2 to 32"),
        (["--data.name", "npz"], "needs --data.root"),
        (["--depth", "99"], "--depth: expected 1 to 16, got 99"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(tmp_path, capsys, arguments, words):
    assert residual_flow.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_divergence_is_an_error_that_names_the_step(tmp_path):
    config = FlowConfig(tmp_path, steps=20, batch=8, blocks=1, width=8, lr=1e3)
    with pytest.raises(NonFiniteError, match="at step .*: lower --lr"):
        residual_flow.fit(config)
    assert not list(tmp_path.iterdir())
