"""Attributes and checks that generators and their wrappers share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from copgen_fast.errors import CopgenError, UsageError, explain, in_one_line
from copgen_fast.ops.checks import expect_tensor

ROUNDING = 0.01
"""How far beyond [-1, 1] images may be, as those of half precision are."""

DEFAULTS = {"classes": 0, "latent_groups": (), "prior": "truncnorm", "differentiable": True}
"""Attributes that a user's generator may leave out."""

ATTRIBUTES = ("latent_dim", "latent_shape", "image_shape", *DEFAULTS, "sample", "weights_file")


def copy_attributes(generator: nn.Module, wrapper: nn.Module) -> None:
    """Give a wrapper the attributes of the generator in it."""
    for name in ATTRIBUTES:
        if hasattr(generator, name) or name in DEFAULTS:
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


def values_fault(images: Tensor) -> str | None:
    """What is wrong with the values of images that should be in [-1, 1]."""
    if not images.isfinite().all():
        return "NaN or infinity"
    if images.abs().max() > 1 + ROUNDING:
        return f"values from {images.min():.4g} to {images.max():.4g}: scale or clamp them"
    return None


def failed(error: Exception, generator: nn.Module, z: Tensor, labels: Tensor | None, remedy: str = "") -> CopgenError:
    """What a user can do about an exception of a generator's forward; `remedy` where nothing else shows."""
    if known := explain(error):
        return known
    given = "" if labels is None else f" and labels {labels.tolist()}"
    tensors = (tensor for tensor in generator.state_dict().values() if isinstance(tensor, Tensor))
    others = {str(x.dtype) for x in tensors if x.is_floating_point() and x.dtype != z.dtype}
    if others:
        remedy = f": its weights are {', '.join(sorted(others))} and latents {z.dtype}: return it as float32, G.float()"
    elif labels is None and getattr(generator, "labelled", False):
        remedy = ": its forward takes labels: declare classes, their number"
    return UsageError(f"images of latents {list(z.shape)}{given}: {in_one_line(error)}{remedy}")


def faults(generator: nn.Module) -> Iterator[str]:
    """Violations of the `Generator` interface, by the attributes and by the images of two latents.

    The latents are on the device of the generator's tensors, where the images should be, too. Of classes the first and
    the last are tried.

    Raises:
        UsageError: its forward fails.
    """
    length, shape = (getattr(generator, name, None) for name in ("latent_dim", "image_shape"))
    classes, groups = generator.classes, generator.latent_groups
    attributes = []
    if not isinstance(length, int) or length < 1:
        attributes.append(f"latent_dim: expected the length of a latent, 1 or more, got {length!r}")
    elif not isinstance(generator.latent_shape, tuple) or math.prod(generator.latent_shape) != length:
        attributes.append(f"latent_shape: expected sizes whose product is {length}, got {generator.latent_shape!r}")
    if not isinstance(shape, Sequence) or len(shape) != 3 or shape[0] != 3:
        attributes.append(f"image_shape: expected (3, height, width), got {shape!r}")
    if not isinstance(classes, int) or classes < 0:
        attributes.append(f"classes: expected the number of classes, 0 or more, got {classes!r}")
    if not isinstance(groups, tuple) or (groups and sum(groups) != length):
        attributes.append(f"latent_groups: expected () or sizes that sum to latent_dim {length}, got {groups!r}")
    yield from attributes
    if attributes:
        return
    device = next((tensor.device for tensor in generator.state_dict().values()), torch.device("cpu"))
    z = generator.sample(0, 2).to(device)
    labels = torch.tensor([0, classes - 1], device=device) if classes else None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            images = generator(z, labels)
    except Exception as error:
        raise failed(error, generator, z, labels) from error
    wanted = f"forward of latents [2, {length}]: expected floating-point images {[2, *shape]} in [-1, 1]"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        yield f"{wanted}, got {images.dtype if isinstance(images, Tensor) else type(images).__name__}"
    elif images.device != z.device:
        yield f"{wanted}, on {z.device} as the latents, got them on {images.device}"
    elif images.shape != (2, *shape):
        yield f"{wanted}, got shape {list(images.shape)}"
    elif fault := values_fault(images):
        yield f"{wanted}, got {fault}"
    elif getattr(generator, "image_range", ()) is None and images.min() >= 0:
        got = f"{images.min():.4g} to {images.max():.4g}"
        yield f"{wanted}, got values from {got}: declare image_range as (0, 1) or (-1, 1)"
