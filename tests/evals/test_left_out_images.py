"""Evaluations where images can't be decoded and are left out: numbers of the others, or one line that says why none."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from copgen_fast.config import DataConfig, EncoderConfig
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.evals import freeze, linear_grid, real_images
from copgen_fast.runtime.memory import peak_memory
from tests.evals.test_evals import function
from tests.helpers.eval_runs import Colours, measure, run_on

COLOURS = (200, 20, 20), (20, 200, 20), (20, 20, 200)
CHOOSING = {
    "linear": (),
    "lowshot": ("shots=2",),
    "knn": ("neighbours=3",),
    "lbfgs": ("size=8", "penalties=3", "validation=0.4"),
    "linear-augmented": ("epochs=3",),
    "linear-grid": ("epochs=3", "passes=2", "held_out=0.4"),
    "vissl": ("size=8", "epochs=3"),
    "semi-supervised": ("size=8", "epochs=2", "fractions=0.5"),
}


@pytest.fixture
def photographs(tmp_path):
    for split, count in (("train", 6), ("test", 4)):
        for name, colour in zip("abc", COLOURS, strict=True):
            for number in range(count):
                path = tmp_path / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), tuple(level + 3 * number for level in colour)).save(path)
    return DataConfig("folder", str(tmp_path / "images"), 8, "skip")


def damage(data, pattern):
    for path in Path(data.root).glob(pattern):
        path.write_bytes(b"damaged")


def network():
    torch.manual_seed(0)
    return nn.Sequential(Colours(), nn.Linear(12, 12))


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.filterwarnings("ignore:left out")
def test_a_class_without_training_images_shifts_no_other(photographs, tmp_path, name):
    damage(photographs, "train/a/*")
    if name == "lowshot":
        with pytest.raises(UsageError, match="of class 0, got 2"):
            measure(name, network(), photographs, tmp_path, *CHOOSING[name])
        return
    found = measure(name, network(), photographs, tmp_path, *CHOOSING[name])
    assert any(key.endswith(("top1", "top1_last")) for key in found)
    if name in ("linear", "knn", "lbfgs"):
        assert found[f"{name}_top1"] == pytest.approx(2 / 3), "it is never found, and the others are"


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.filterwarnings("ignore:left out")
def test_no_test_image_is_one_line(photographs, tmp_path, name):
    damage(photographs, "test/*/*")
    with pytest.raises(UsageError, match="images: no test image can be decoded"):
        measure(name, network(), photographs, tmp_path, *CHOOSING[name])


@pytest.mark.filterwarnings("ignore:left out")
def test_lidar_goes_on_where_a_batch_is_left_out(photographs, tmp_path):
    damage(photographs, "train/b/[0-3]*")
    encoder = Encoder(EncoderConfig("resnet18", "cifar", 8))
    words = "views=8", "augmentation=simclr"
    assert 1 < measure("lidar", encoder, photographs, tmp_path, *words, batch=8)["lidar"] <= 14


@pytest.mark.filterwarnings("ignore:left out")
def test_the_grid_takes_no_more_memory_where_an_image_is_left_out(photographs, tmp_path):
    """It says before it starts how much its features take."""
    encoder = function(lambda images: images[:, :, :1, 0].repeat_interleave(50_000, 1).flatten(1))

    def peak():
        run = run_on(photographs, tmp_path, "linear-grid", batch=1)
        arguments = freeze(encoder, run), real_images(run), linear_grid.Config(passes=8), 0
        return peak_memory(lambda: linear_grid.encode(*arguments))

    whole = peak()
    damage(photographs, "train/a/3.png")
    assert whole is None or peak() < 1.4 * whole


def test_features_that_do_not_fit_memory_are_refused_after_a_batch(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("copgen_fast.evals._frozen.available_memory", lambda device: 0.01)
    with pytest.raises(UsageError, match="features of 18 train images of 192 numbers take .* GB of memory are free"):
        measure("linear", nn.Flatten(), photographs, tmp_path)
