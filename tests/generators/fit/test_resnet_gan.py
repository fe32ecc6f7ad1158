import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from copgen_fast import generators
from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals import _frechet
from copgen_fast.generators.fit import gan_training, resnet_gan
from copgen_fast.generators.fit.resnet_gan import GanConfig
from copgen_fast.images.sets import load
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.interrupts import Interrupted, handle_signals

BYTES = ("generator.safetensors", "grids/0000000.png", "grids/0000004.png", "grids/0000006.png")


def tiny(out, **changes):
    config = GanConfig(
        out, steps=6, batch=4, width=8, latent_dim=16, device="cpu", log_every=1, save_every=2, grid_every=4
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer latents for the batch norms' statistics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_training, "STANDING", (2, 64))
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "new"
    arguments = "--steps 6 --batch 4 --width 8 --latent-dim 16 --device cpu --log-every 1 --save-every 2 --grid-every 4"
    assert resnet_gan.main(["--out", str(folder), *arguments.split()]) == 0
    return folder


def test_what_is_written_loads_and_says_how_it_was_made(fitted):
    path = fitted / "generator.safetensors"
    generator = generators.build("resnet-gan", path)
    assert (generator.latent_dim, generator.width) == (16, 8)
    assert generator(torch.zeros(2, 16)).shape == (2, 3, 32, 32)
    with safe_open(path, "pt") as file:
        made = json.loads(file.metadata()["copgen_fast"])
    assert made["architecture"] == "resnet-gan" and made["data"] == "digits" and made["steps"] == 6
    with Image.open(fitted / "grids" / "0000006.png") as grid:
        assert grid.size == (16 * 34 + 2, 8 * 34 + 2)
    assert not list(fitted.rglob("*.incomplete"))


def test_the_summary_holds_the_last_losses_and_the_distances(fitted):
    summary = artifacts.read_json(fitted / "summary.json")
    rows = [json.loads(line) for line in (fitted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert summary["steps"] == 6 and summary["samples"] == 24
    assert summary["loss_generator"] == rows[-1]["loss_generator"]
    for name in ("frechet_pixels", "frechet_random"):
        assert 0 < summary[f"real_{name}"] < summary[name]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(fitted, tmp_path):
    torch.rand(5)  # the caller's random state must not matter
    resnet_gan.fit(tiny(tmp_path / "again"))
    for name in BYTES:
        assert (tmp_path / "again" / name).read_bytes() == (fitted / name).read_bytes(), name
    resnet_gan.fit(tiny(tmp_path / "other", seed=1, steps=1))
    assert (tmp_path / "other" / BYTES[1]).read_bytes() != (fitted / BYTES[1]).read_bytes()


def test_a_run_killed_or_stopped_goes_on_to_the_same_bytes(fitted, tmp_path, monkeypatch):
    whole = gan_training.step

    def killed(players, index, batch):
        if index == 3:  # the last checkpoint is of step 2
            raise MemoryError
        return whole(players, index, batch)

    def stopped(players, index, batch):
        if index == 4:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return whole(players, index, batch)

    monkeypatch.setattr(gan_training, "step", killed)
    with pytest.raises(MemoryError):
        resnet_gan.fit(tiny(tmp_path))
    monkeypatch.setattr(gan_training, "step", stopped)
    with handle_signals(), pytest.raises(Interrupted, match="stopped at step 5"):
        resnet_gan.fit(tiny(tmp_path))
    assert not (tmp_path / "generator.safetensors").exists()
    monkeypatch.setattr(gan_training, "step", whole)
    resnet_gan.fit(tiny(tmp_path))
    for name in BYTES:
        assert (tmp_path / name).read_bytes() == (fitted / name).read_bytes(), name
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (fitted, tmp_path)
    ]
    assert rows[0] == rows[1]


def test_a_finished_run_again_changes_nothing(fitted):
    before = (fitted / "generator.safetensors").read_bytes()
    resnet_gan.fit(tiny(fitted))
    assert (fitted / "generator.safetensors").read_bytes() == before


def test_a_folder_of_something_else_is_refused_and_left_alone(fitted, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"holds another run: steps \(6 there, 7 here\).*another --out"):
        resnet_gan.fit(tiny(fitted, steps=7))
    with pytest.raises(UsageError, match="data.name"):
        resnet_gan.fit(tiny(fitted, data=DataConfig("npz", str(toy(tmp_path / "toy.npz")))))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert resnet_gan.main(["--out", str(tmp_path / "mine"), "--steps", "1"]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps: expected 1 or more, got 0"),
        ({"batch": 1}, "--batch: expected 2 or more, got 1"),
        ({"width": 0}, "--width: expected 1 to 4096, got 0"),
        ({"latent_dim": 0}, "--latent-dim: expected 1 or more"),
        ({"lr": float("nan")}, "--lr: expected 1e-12 to 1000, got nan"),
        ({"average": 1.0}, "--average: expected 0 to 0.99999, got 1"),
        ({"augmentation": "gna"}, "unknown policy 'gna'"),
        ({"data": DataConfig(image_size=64)}, "--data.image-size: the generator draws 32 px, got 64"),
        ({"data": DataConfig("npz")}, "needs --data.root"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        resnet_gan.fit(tiny(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_a_set_too_small_to_evaluate_on_is_refused_before_training(tmp_path):
    data = DataConfig("npz", str(toy(tmp_path / "toy.npz", n=4, held_out=1)))
    with pytest.raises(UsageError, match="two training and two test images or more"):
        resnet_gan.fit(tiny(tmp_path / "new", data=data))
    assert not (tmp_path / "new").exists()


def test_the_augmentation_follows_the_data_unless_named(tmp_path):
    assert resnet_gan.augmentation_name(tiny(tmp_path)) == "gan-digits"
    assert resnet_gan.augmentation_name(tiny(tmp_path, data=DataConfig("npz"))) == "gan"
    assert resnet_gan.augmentation_name(tiny(tmp_path, augmentation="none")) == "none"


def toy(path, n=128, held_out=64):
    """A .npz of an easy set: a bright square on dark blue, somewhere near the middle."""
    random = np.random.RandomState(0)
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[..., 2] = 90
    for image, (top, left) in zip(images, random.randint(8, 13, (n, 2)), strict=True):
        image[top : top + 12, left : left + 12] = (250, 200, random.randint(50, 200))
    labels = np.arange(n) % 2
    train, test = slice(held_out, None), slice(held_out)
    arrays = {"train_images": images[train], "train_labels": labels[train]}
    np.savez(path, **arrays, test_images=images[test], test_labels=labels[test])
    return path


def test_a_little_training_brings_samples_nearer_to_an_easy_set(tmp_path):
    data = DataConfig("npz", str(toy(tmp_path / "toy.npz")))
    config = tiny(tmp_path / "run", data=data, steps=40, batch=8, augmentation="gan-shift", lr=2e-3, save_every=40)
    config = dataclasses.replace(config, grid_every=40, discriminator_steps=1)
    untrained = gan_training.with_statistics(
        resnet_gan.make_players(config, torch.device("cpu")).average, config.prior, config.seed
    )
    real = load(data)
    before, after = resnet_gan.evaluate(untrained, real, config), resnet_gan.fit(config)
    for name in ("frechet_pixels", "frechet_random"):
        assert after[name] < 0.6 * before[name], (name, before, after)
    assert _frechet.distances(resnet_gan.as_floats(real.train_images), resnet_gan.as_floats(real.test_images)) == {
        name: pytest.approx(after[f"real_{name}"]) for name in ("frechet_pixels", "frechet_random")
    }
