"""Frozen generators, latent z -> image: one file each, named as the file. `build` is the way in."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from copgen_fast import registry
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError
from copgen_fast.generators._optimize import Level, optimize
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.runtime import artifacts

__all__ = ["Generator", "Level", "Rewrites", "build", "digest", "load", "optimize"]


class Generator(Protocol):
    """What the stages ask of a generator: an nn.Module with these members.

    Attributes:
        latent_dim: length L of a latent.
        image_shape: (C, H, W) of an image; C is 3.
        classes: how many classes an image's may be chosen from; 0: it is not conditional.
        weights_file: what it was built from.
    """

    latent_dim: int
    image_shape: tuple[int, int, int]
    classes: int
    weights_file: Path

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L], floating, to images [N, C, H, W] in [-1, 1], differentiable with respect to z.

        N may be 0. Row i depends on z[i] and labels[i] alone.

        Args:
            labels: int64 [N] in 0 .. classes - 1, for a conditional generator; None for another.
        """
        ...

    def __call__(self, z: Tensor, labels: Tensor | None = None) -> Tensor: ...


def build(name: str, weights: str | Path | None = None, **options: float) -> nn.Module:
    """Build generator `name`, a `Generator`, on the CPU: in eval mode, no parameter asking for a gradient.

    Args:
        weights: file of its weights; None takes those embedded in the package, where there are any.
        options: what its own `build` takes besides: biggan-deep's truncation.

    Raises:
        UsageError: an unknown name, weights that are missing or do not fit, or an option that it does not have.
    """
    make = registry.load("generators", name).build
    for option in options.keys() - inspect.signature(make).parameters.keys():
        raise UsageError(f"generator.{option}: generator {name} has none, leave it out")
    generator = make(weights, **options)
    return generator.eval().requires_grad_(False)


def load(config: GeneratorConfig, device: torch.device, batch: int | None = None) -> nn.Module:
    """The generator of a run, on its device and as fast as `config.level` says.

    Its attribute `record` says what it was made from, for artefacts: name, weights (the file, or "embedded"), the
    file's sha256 and the `digest` of what it holds; in half precision also its `difference` from float32, in levels of
    256, which is printed, as is the sha256 of a file from outside the package.

    Args:
        batch: latents that most calls will have, for level graph; None: without one it is half.

    Raises:
        UsageError: see `build`; `config.checkpoint` for a generator without a rewritten form; a graph without a GPU.
        CopgenError: see `optimize`.
    """
    options = {} if config.truncation is None else {"truncation": config.truncation}
    published = build(config.name, config.weights, **options).to(device)
    if config.checkpoint and (config.level == "published" or not hasattr(published, "rewritten")):
        raise UsageError(f"generator.checkpoint: {config.name} at level {config.level} has no such form: leave it out")
    if config.level == "published":
        generator = published
    else:
        if config.level == "graph" and device.type != "cuda":
            raise UsageError(f"generator.level: graph needs a GPU, and the run is on {device}: choose exact or half")
        level = "half" if config.level == "graph" and batch is None else config.level
        generator = optimize(published, level, batch=batch, checkpoint=config.checkpoint)
    generator.record = _record(config.name, published)
    if hasattr(generator, "half_dtype"):
        generator.record["difference"] = asdict(generator.difference)
        print(f"generator {config.name}: {generator.half_dtype} differs by {generator.difference}", flush=True)
    return generator


def _record(name: str, published: nn.Module) -> dict[str, Any]:
    file = published.weights_file.resolve()
    embedded = file.is_relative_to(Path(__file__).parent)
    sha256 = artifacts.sha256(file)
    if not embedded:
        print(f"generator {name}: {file}, sha256 {sha256}", flush=True)
    return {
        "name": name,
        "weights": "embedded" if embedded else str(file),
        "sha256": sha256,
        "digest": digest(published),
    }


def digest(generator: nn.Module) -> str:
    """SHA-256 (hex) of the state dict: each entry's name, dtype, shape and bytes, in order of name.

    Artefacts record it, so that it is known which weights made them. It does not depend on the device.
    """
    sha = hashlib.sha256()
    for name, value in sorted(generator.state_dict().items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
