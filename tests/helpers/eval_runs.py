"""What an evaluation sees of a run, and small sets of noisy class colours in files."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from copgen_fast.config import DataConfig, PretrainConfig, ProbeConfig, RunConfig
from copgen_fast.evals import evaluate


@dataclasses.dataclass(frozen=True, eq=False)
class EvalRun:
    """The part of a run that evaluations may read."""

    config: RunConfig
    folder: Path
    device: torch.device = torch.device("cpu")


def run_on(data, folder, name, *words, seed=0, batch=64):
    """A run of one evaluation on the data set `data`, a DataConfig, with options as NAME.field=value's second parts."""
    probe = ProbeConfig(evals=(name,), options=tuple(f"{name}.{word}" for word in words), batch=batch)
    config = RunConfig(seed=seed, data=data, probe=probe, pretrain=PretrainConfig(augmentation="none"))
    return EvalRun(config, folder)


def measure(name, encoder, data, folder, *words, **options):
    """Numbers of one evaluation of an encoder."""
    return evaluate(name, encoder, run_on(data, folder, name, *words, **options))


def save_noisy_classes(folder, signal, per_class=24, test_per_class=20, size=8, classes=4):
    """An .npz file of noise images, plus `signal` times a colour of the class."""
    rng, arrays = np.random.default_rng(0), {}
    colours = rng.normal(size=(classes, 3))
    for split, count in (("train", per_class), ("test", test_per_class)):
        labels = np.arange(classes).repeat(count)
        noise = rng.normal(size=(len(labels), size, size, 3))
        images = 128 + 20 * (noise + signal * colours[labels][:, None, None])
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    np.savez(folder / "images.npz", **arrays)
    return DataConfig("npz", str(folder / "images.npz"), image_size=size)


class Colours(torch.nn.Module):
    """An encoder without weights: the mean colours of an image's quarters."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
