"""Frozen generators G: latent z -> image. One file each; `build` makes them by name, module or file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from copgen_fast import files, registry
from copgen_fast.config import GeneratorConfig, Prior
from copgen_fast.errors import CopgenError, UsageError, in_one_line
from copgen_fast.generators._adapt import Adapted, OwnPrior, takes_labels
from copgen_fast.generators._check import Findings, examine
from copgen_fast.generators._interface import DEFAULTS, faults
from copgen_fast.generators._optimize import Level, optimize
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.generators._weights import held
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.latents import NamedPrior, Sample

__all__ = [
    "Generator",
    "Level",
    "Rewrites",
    "build",
    "check",
    "digest",
    "expect_differentiable",
    "expect_size",
    "load",
    "optimize",
    "resolve_level",
]


class Generator(Protocol):
    """The interface of a generator: an nn.Module with these members, which `build` completes.

    A module that makes images in another form is made one by `_adapt.Adapted`, which says what it may declare.

    Attributes:
        latent_dim: length L of a latent.
        latent_shape: what a latent's L numbers stand for, (L,) or say (4, 64, 64); z is [N, L] in any case.
        image_shape: (3, H, W) of an image.
        classes: number of classes of a conditional generator; 0 (the default): unconditional.
        latent_groups: sizes of the parts of a latent that act on different layers, which sum to L; () (the default):
            it is one vector.
        prior: name of the distribution of latents, see `runtime.latents.sample`, or "own".
        differentiable: whether a gradient reaches z, as found for a generator of the user's own.
        sample: (seed, n) to latents [n, L] of it, float32 on the CPU, which depend on these two alone.
        weights_file: file that its weights come from; by default the file given or, without one, its source file.
    """

    latent_dim: int
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    classes: int
    latent_groups: tuple[int, ...]
    prior: str
    differentiable: bool
    sample: Sample
    weights_file: Path

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L], floating, to images [N, 3, H, W] in [-1, 1], differentiable with respect to z.

        N may be 0. Row i depends on z[i] and labels[i] alone.

        Args:
            labels: int64 [N] in 0 .. classes - 1, for a conditional generator; None for another, whose forward may
                as well take z alone.
        """
        ...

    def __call__(self, z: Tensor, labels: Tensor | None = None) -> Tensor: ...


def build(name: str, weights: str | Path | None = None, options: Iterable[str] = ()) -> nn.Module:
    """Build a `Generator` on the CPU, in eval mode and without gradients of its parameters.

    Args:
        name: a built-in generator, a dotted module or a Python file; it has `build(weights, config)`.
        weights: file of its weights; None takes those embedded in the package, where there are any.
        options: fields of its `Config`, as "field=value".

    Raises:
        UsageError: an unknown name or option, weights that are missing or do not fit, or no `Generator`: its
            attributes and the images of two latents are checked.
    """
    part = registry.load("generators", name)
    make, config = registry.function("generators", name), registry.options("generators", name, options)
    if weights is not None and name not in registry.names("generators") and not Path(weights).is_dir():
        files.expect_file(weights)
    try:
        generator = make(weights, config)
    except CopgenError:
        raise
    except (Exception, SystemExit) as error:  # of a user's part, or of what it reads
        raise UsageError(f"generator {name}: its build fails with {in_one_line(error)}; {held(weights)}") from error
    if not isinstance(generator, nn.Module):
        raise UsageError(f"generator {name}: build must return a torch.nn.Module, got {type(generator).__name__}")
    generator.eval().requires_grad_(False)
    for attribute in ("latent_dim", "latent_shape", "image_shape", "classes"):
        value = getattr(generator, attribute, None)
        if (plain := _plain(value)) is not value:
            setattr(generator, attribute, plain)
    try:
        if not takes_labels(generator) or not (name in registry.names("generators") or hasattr(generator, "rewritten")):
            generator = Adapted(generator).eval()
        _complete(generator, weights if weights is not None and Path(weights).is_file() else part.__file__)
        for fault in faults(generator):
            raise UsageError(fault)
    except UsageError as error:
        raise UsageError(f"generator {name}: {error}") from error
    return generator


def _complete(generator: nn.Module, file: str | Path) -> None:
    """Set the attributes that a generator may leave out."""
    length = getattr(generator, "latent_dim", None)
    for attribute, value in (DEFAULTS | {"weights_file": Path(file), "latent_shape": (length,)}).items():
        if not hasattr(generator, attribute):
            setattr(generator, attribute, value)
    if hasattr(generator, "sample"):
        generator.prior, generator.sample = (
            "own",
            OwnPrior(generator.sample, length, getattr(generator, "sample_each", None)),
        )
    else:
        _set_prior(generator, generator.prior)


def _set_prior(generator: nn.Module, prior: Prior) -> None:
    if prior not in get_args(Prior):
        raise UsageError(f"prior: expected one of {', '.join(get_args(Prior))}, got {prior!r}")
    generator.prior, generator.sample = prior, NamedPrior(prior, generator.latent_dim)


def _plain(value: object) -> object:
    """Integers of other types, NumPy's say, alone or in a sequence or array, as int; anything else as it is."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, (tuple, list, np.ndarray)) and any(_plain(x) is not x for x in value):
        return tuple(_plain(x) for x in value)
    return value


def load(config: GeneratorConfig, device: torch.device, batch: int | None = None) -> nn.Module:
    """The generator of a run, on its device and as fast as `config.level` says.

    Its attribute `record` describes it in artefacts: name, weights (the file, or "embedded"), the file's sha256, the
    `digest` of the tensors, the prior, and options that are not the default; in half precision also its `difference`
    from float32, in levels of 256, which is printed, as is the sha256 of a file from outside the package.

    Args:
        batch: latents that most calls will have, for level graph; None: without one it is half.

    Raises:
        UsageError: see `build`; `config.checkpoint` for a generator without such a form; a graph without a GPU.
        CopgenError: see `optimize`.
    """
    config = resolve_level(config, device)
    published = build(config.name, config.weights, config.options).to(device)
    if config.prior is not None:
        if published.prior == "own":
            raise UsageError(f"generator.prior: {config.name} draws its latents itself: leave it out")
        _set_prior(published, config.prior)
    for fault in faults(published) if device.type != "cpu" else ():
        raise UsageError(f"generator {config.name} on {device}: {fault}")
    if isinstance(published, Adapted) or config.name not in registry.names("generators"):
        published.differentiable = check(published, config, device).differentiable
    if hasattr(published, "checkpointed"):
        published.checkpointed = config.checkpoint
    elif config.checkpoint and (config.level == "published" or not hasattr(published, "rewritten")):
        raise UsageError(f"generator.checkpoint: {config.name} at level {config.level} has no such form: leave it out")
    if config.level == "published":
        generator = published
    else:
        if config.level == "graph" and device.type != "cuda":
            raise UsageError(f"generator.level: graph needs a GPU, and the run is on {device}: choose exact or half")
        level = "half" if config.level == "graph" and batch is None else config.level
        generator = optimize(published, level, batch=batch, checkpoint=config.checkpoint)
    generator.record = _record(config, published)
    if hasattr(generator, "half_dtype"):
        generator.record["difference"] = dataclasses.asdict(generator.difference)
        print(f"generator {config.name}: {generator.half_dtype} differs by {generator.difference}", flush=True)
    return generator


def resolve_level(config: GeneratorConfig, device: torch.device) -> GeneratorConfig:
    """The configuration with a level that is not `auto`: half on a GPU, but exact where half is refused, which is
    printed, and on other devices, whose half precision is slower.

    Raises:
        UsageError: see `load`.
    """
    if config.level != "auto":
        return config
    half, exact = (dataclasses.replace(config, level=level) for level in ("half", "exact"))
    if device.type != "cuda":
        return exact
    try:
        load(half, device)
    except CopgenError as error:
        load(exact, device)  # raises what half precision is not to blame for
        print(f"generator {config.name}: level exact, as {error}", flush=True)
        return exact
    print(f"generator {config.name}: level half", flush=True)
    return half


_CHECKED: dict[tuple[object, ...], Findings] = {}


def check(generator: nn.Module, config: GeneratorConfig, device: torch.device) -> Findings:
    """Examine a generator as `_check.examine` does and print what was found, once a process.

    Raises:
        UsageError: no stage can use it.
    """
    part = registry.load("generators", config.name)  # another module for another content of a file
    key = (part, config, str(device), digest(generator))
    if key not in _CHECKED:
        try:
            _CHECKED[key] = examine(generator, device)
        except UsageError as error:
            raise UsageError(f"generator {config.name}: {error}") from error
        for line in str(_CHECKED[key]).splitlines():
            print(f"generator {registry.label(config.name)}: {line}", flush=True)
    return _CHECKED[key]


def expect_differentiable(generator: nn.Module, config: GeneratorConfig, stage: str) -> None:
    """Raises UsageError where no gradient reaches z, without which a stage can't learn."""
    if not getattr(generator, "differentiable", True):
        raise UsageError(
            f"generator {config.name}: no gradient reaches z, and {stage} learns by it: write its forward in "
            "differentiable operations without no_grad, or take other positives (--pairs.positives gaussian) and "
            f"--stages without {stage}"
        )


def expect_size(generator: nn.Module, option: str, size: int | None) -> None:
    """Raises UsageError where an option asks for images that are larger than the generator's."""
    if size is not None and size > (least := min(generator.image_shape[1:])):
        raise UsageError(f"{option}: expected at most the generator's {least} pixels, got {size}")


def _record(config: GeneratorConfig, published: nn.Module) -> dict[str, Any]:
    file = Path(published.weights_file).resolve()
    embedded = file.is_relative_to(Path(__file__).parent)
    sha256 = getattr(published, "weights_sha256", None) or files.sha256(file)
    if not embedded:
        print(f"generator {config.name}: {file}, sha256 {sha256}", flush=True)
    options = registry.options("generators", config.name, config.options)
    default = registry.options("generators", config.name)
    return {
        "name": registry.label(config.name),
        "weights": "embedded" if embedded else str(file),
        "sha256": sha256,
        "digest": digest(published),
        "prior": published.prior,
        "options": {
            name: value for name, value in dataclasses.asdict(options).items() if value != getattr(default, name)
        },
    }


def digest(generator: nn.Module) -> str:
    """SHA-256 (hex) of the state dict: each entry's name, dtype, shape and bytes, in order of name.

    Recorded in artefacts, to identify the weights that made them. It does not depend on the device.
    """
    return artifacts.tensors_digest(generator.state_dict())
