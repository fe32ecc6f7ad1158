"""Views of the navigator and images of pairs that are smaller than the generator's."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from copgen_fast import generators
from copgen_fast.config import EncoderConfig, NavigatorConfig, PairsConfig
from copgen_fast.errors import UsageError
from copgen_fast.pairs.format import to_uint8
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import latents
from copgen_fast.stages import Run, navigator, pairs
from copgen_fast.train import main
from copgen_fast.verify import main as verify

CPU = torch.device("cpu")


def run_of(folder, **changes):
    return Run(dataclasses.replace(PRESETS["quickstart"], **changes), folder, CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "run"
    words = ["quickstart", "--device", "cpu", "--out", str(folder), "--stages", "navigator", "pairs"]
    words += ["--navigator.samples", "16", "--navigator.batch", "8", "--navigator.view-size", "8"]
    words += ["--navigator.estimator.width", "4", "--pretrain.batch", "4"]
    words += ["--pairs.count", "8", "--pairs.size", "12", "--pairs.positives", "navigator"]
    assert main(words) == 0
    return folder


def test_shards_hold_resized_images_that_can_be_made_again(finished, capsys):
    index = json.loads((finished / "pairs" / "navigator" / "index.json").read_text())
    assert index["image_shape"] == [3, 12, 12] and index["identity"]["image_size"] == 12
    G = generators.build("digits")
    z = latents.each(G.sample, range(8))
    wanted = to_uint8(F.interpolate(G(z), (12, 12), mode="bilinear", antialias=True))
    stored = torch.stack([PairDataset(finished / "pairs" / "navigator")[i][0] for i in range(8)])
    assert (wanted.int() - stored.int()).abs().max() <= 1
    assert verify([str(finished), "--device", "cpu"]) == 0
    assert "8 pairs made again" in capsys.readouterr().out


def test_pairs_of_another_size_are_other_pairs(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["pairs.size"], config["navigator.view_size"]) == (12, 8)
    made = PairsConfig(positives=("navigator",), count=8, shard_size=1024, size=16)
    run = run_of(finished, pairs=made, navigator=NavigatorConfig(estimator=EncoderConfig(stem="cifar", width=4)))
    with pytest.raises(UsageError, match=r"image_size \(12 there, 16 here\)"):
        pairs.expect_own(run, "navigator")


def test_the_gradient_reaches_t_z_through_small_views(tmp_path):
    options = NavigatorConfig(batch=4, view_size=8, estimator=EncoderConfig(stem="cifar", width=4))
    run = run_of(tmp_path, navigator=options)
    G = generators.build("digits")
    players = navigator.make_players(run, G, navigator.untrained(G.latent_dim, options, 0))
    batch = navigator.draw_batch(run.config, G, 0, CPU)
    _, _, x_prime = navigator.generate(players, batch.z, None)
    v = navigator.t_x(players, x_prime, batch.params_prime)
    assert v.shape == (4, 3, 8, 8)
    v.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in players.T_z.parameters())


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            navigator,
            {"navigator": NavigatorConfig(view_size=33)},
            "navigator.view_size: .*generator's 32 pixels, got 33",
        ),
        (
            pairs,
            {"pairs": PairsConfig(size=64, positives=("identity",))},
            "pairs.size: expected at most the gener.* 64",
        ),
    ],
)
def test_images_are_not_enlarged(tmp_path, stage, changes, message):
    with pytest.raises(UsageError, match=message):
        stage.run(run_of(tmp_path, **changes))


def test_sizes_are_numbers_of_pixels(capsys):
    assert main(["quickstart", "--pairs.size", "4"]) == 2
    assert "pairs.size: expected 8 to 4096, got 4" in capsys.readouterr().err
