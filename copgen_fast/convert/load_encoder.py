"""Encoders from files of any code, ready to compute: the network is told by the weights, or named by the user."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from copgen_fast.config import RunConfig
from copgen_fast.convert.encoder_names import WRAPPERS, read_encoder, spell
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.files import sha256
from copgen_fast.record import expect_current, expect_valid, from_identity
from copgen_fast.runtime import artifacts, unpickle, weights

_OTHERS = "a network of other packages is named by --encoder.name torchvision:NAME or timm:NAME"


@dataclass(frozen=True)
class EncoderOptions:
    """Which network a file's weights are of, where they don't tell it themselves."""

    name: str = "auto"
    """auto: a ResNet-18 or -50 of any width. torchvision:NAME or timm:NAME: another network of these packages, as
    timm:vit_small_patch16_224."""
    stem: Literal["auto", "imagenet", "cifar", "half"] = "auto"
    """First layers of a ResNet. auto: as the run that made it, or by the weights, a 3x3 convolution being cifar's."""
    prefix: str | None = None
    """What stands before the encoder's names in a file that holds several, as module.encoder_k. or teacher.backbone."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A network and where it came from.

    Attributes:
        module: normalised images [N, 3, S, S] -> features [N, D].
        summary: what of the file was taken, in one line.
        record: the same for results.
        run: configuration of the run that made the file, None for files of other code.
    """

    module: nn.Module
    summary: str
    record: dict[str, Any] = field(default_factory=dict)
    run: RunConfig | None = None


def load(path: Path, options: EncoderOptions) -> LoadedEncoder:
    """Read an encoder; nothing of the file is executed, and a part of its weights is never taken for all of them.

    Raises:
        UsageError: no file of weights, of another network, or not all of its weights; the message names them.
        CorruptArtifactError: it is truncated or altered.
    """
    digest, content, run = sha256(path), weights.read(path), run_of(path)
    with unpickle.damage(str(path)):
        if options.name == "auto":
            module, what, record = _resnet(content.tree, path, options, run)
        else:
            module, what, record = _named(content.tree, path, options)
    return LoadedEncoder(module, f"{path}: {what}", {"file": str(path), "sha256": digest, **record}, run)


def run_of(path: Path) -> RunConfig | None:
    """The configuration of the run whose folder a file lies in as its encoder, RUN/pretrain/SOURCE/METHOD/FILE."""
    folders = path.absolute().parents
    if len(folders) < 4 or folders[2].name != "pretrain" or not (record := folders[3] / "config.json").exists():
        return None
    values = artifacts.read_json(record)
    expect_valid(values, record)
    expect_current(values, folders[3])
    return from_identity(values)


def _resnet(tree: Any, path: Path, options: EncoderOptions, run: RunConfig | None) -> tuple[nn.Module, str, dict]:
    """An encoder of this package, in any spelling of its names."""
    try:
        found = read_encoder(tree, prefix=options.prefix)
    except UsageError as error:
        raise UsageError(
            f"{path}: {str(error).replace('--prefix or --from', '--encoder.prefix')}; {_OTHERS}"
        ) from error
    config = found.config
    if options.stem != "auto":
        if (options.stem == "imagenet") != (config.stem == "imagenet"):
            size = "7x7" if config.stem == "imagenet" else "3x3"
            raise UsageError(f"--encoder.stem {options.stem}: the first convolution of {path} is {size}")
        config = replace(config, stem=options.stem)
    elif run is not None and config.stem != "imagenet" and run.pretrain.encoder.stem != "imagenet":
        config = replace(config, stem=run.pretrain.encoder.stem)
    module = Encoder(config)
    artifacts.load_strictly(module, found.encoder, path)
    first = _first_layer(tree, found.prefix + spell(found.spelling, "conv1.weight"))
    what = (
        f"{config.name} of width {config.width}, stem {config.stem}, in {found.spelling} names (first layer {first}): "
        f"all {len(found.encoder)} tensors matched"
    )
    record = {"network": config.name, "stem": config.stem, "width": config.width, "names": found.spelling}
    return module, "; ".join([what, *found.notes]), record


def _first_layer(tree: Any, bare: str) -> str:
    """The name in the file, with the parts of wrapping modules, of what is called `bare` without them."""
    names = weights.flatten(tree, ())
    return next(name for name in names if ".".join(part for part in name.split(".") if part not in WRAPPERS) == bare)


def _named(tree: Any, path: Path, options: EncoderOptions) -> tuple[nn.Module, str, dict]:
    """A network of another package, without its classifier."""
    package, _, name = options.name.partition(":")
    if package not in _BUILDERS or not name:
        raise UsageError(f"--encoder.name {options.name}: expected auto, torchvision:NAME or timm:NAME")
    module, classifier = _BUILDERS[package](name)
    wanted = module.state_dict()
    prefix, tensors = weights.select(tree, wanted, path)
    left_out = [key for key in tensors if key not in wanted and key.startswith(classifier)]
    artifacts.load_strictly(module, {key: value for key, value in tensors.items() if key not in left_out}, path)
    what = f"{options.name} (prefix {prefix!r}): all {len(wanted)} tensors matched"
    if left_out:
        what += f"; left out the classifier: {', '.join(left_out[:4])}"
    return module, what, {"network": options.name}


def _torchvision(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """torchvision's classifier of that name without its last linear layer, whose name comes second."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    module = models.get_model(name, weights=None)
    linear = [key for key, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UsageError(f"--encoder.name torchvision:{name}: it has no linear classifier to leave out")
    parent, _, last = linear[-1].rpartition(".")
    setattr(module.get_submodule(parent), last, nn.Identity())
    return module, (f"{linear[-1]}.",)


def _timm(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """timm's network of that name without classifier, and how the names of its classifier start."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"--encoder.name timm:{name} needs the package timm: pip install 'copgen_fast[timm]'"
        ) from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    module = timm.create_model(name, pretrained=False, num_classes=0)
    classifier = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ("head", "fc", "classifier")
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return module, tuple(f"{key}." for key in names)


_BUILDERS = {"torchvision": _torchvision, "timm": _timm}


def _unknown(package: str, name: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f": did you mean {' or '.join(close)}?" if close else ""
    return UsageError(f"--encoder.name {package}:{name}: {package} has no network of that name{hint}")
