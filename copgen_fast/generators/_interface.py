"""Attributes and label checks that generators and their wrappers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from copgen_fast.ops.checks import expect_tensor

DEFAULTS = {"classes": 0, "latent_groups": ()}
"""Attributes that a user's generator may leave out."""


def copy_attributes(generator: nn.Module, wrapper: nn.Module) -> None:
    """Give a wrapper the attributes of the generator in it."""
    for name in ("latent_dim", "image_shape", "classes", "latent_groups", "weights_file"):
        setattr(wrapper, name, getattr(generator, name, DEFAULTS.get(name)))


def expect_labels(labels: object, count: int, classes: int) -> Tensor | None:
    """Check the labels of `count` latents for a generator of `classes` classes (0: unconditional), and return them.

    Raises:
        TypeError: no tensor, or not int64.
        ValueError: missing or superfluous labels, another shape than [count], or, on the CPU alone (elsewhere the
            check would synchronise), a label outside 0 .. classes - 1.
    """
    if classes == 0:
        if labels is not None:
            raise ValueError("labels: expected none, this generator has no classes")
        return None
    if labels is None:
        raise ValueError(f"labels: expected int64 [{count}] in 0 .. {classes - 1}, got none: images depend on a class")
    labels = expect_tensor("labels", labels, (count,), {torch.int64})
    looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and count and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"labels: expected 0 .. {classes - 1}, got values from {labels.min().item()} to {labels.max().item()}"
        )
    return labels
