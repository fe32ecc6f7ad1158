"""Encoders to rename, and the names that others give them, written out without the converter's rules."""

import functools

import torch

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import Encoder


def randomised(state, seed=0):
    """Every tensor with values of its own, so that a swap would show."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).abs() + 0.1
        if value.is_floating_point()
        else torch.tensor(number)
        for number, (name, value) in enumerate(state.items())
    }


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@functools.cache
def small(name, classifier=True):
    """torchvision's network of that name, an eighth as wide: the same names in a small file."""
    with torch.device("meta"):
        state = Encoder(EncoderConfig(name=name, stem="imagenet", width=8)).state_dict()
    dim = state["layer4.0.bn3.weight" if name == "resnet50" else "layer4.0.bn2.weight"].shape[0]
    return randomised(state | ({"fc.weight": torch.ones(10, dim), "fc.bias": torch.ones(10)} if classifier else {}))


def without_fc(state):
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def supcon_names(state):
    """The reference's names, written out independently of the converter's rules."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("conv1."):
            name = "stem.0." + name[6:]
        elif name.startswith("bn1."):
            name = "stem.1." + name[4:]
        renamed["encoder." + name.replace("downsample", "shortcut")] = value
    return renamed


def detectron2_names(state):
    """detectron2's own tool for torchvision weights, in words."""
    renamed = {}
    for name, value in state.items():
        if "layer" not in name:
            name = "stem." + name
        for number in (1, 2, 3, 4):
            name = name.replace(f"layer{number}", f"res{number + 1}")
        for number in (1, 2, 3):
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        renamed[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    return renamed
