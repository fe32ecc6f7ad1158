"""Parameter names of encoders in torchvision, SupContrast, VISSL and detectron2, and conversion between them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from copgen_fast.config import EncoderConfig
from copgen_fast.convert.unpickle import Stored
from copgen_fast.encoders import ContrastiveModel, Encoder
from copgen_fast.errors import UsageError

Spelling = Literal["copgen", "copgen-model", "supcon", "torchvision", "vissl", "detectron2"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)

# torchvision's name -> theirs, by regular expressions that are applied in order.
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "copgen": (),
    "torchvision": (),
    "copgen-model": ((r"^", "encoder."),),
    "supcon": ((r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"\.downsample\.", ".shortcut."), (r"^", "encoder.")),
    "vissl": ((r"^", "_feature_blocks."),),
    "detectron2": (
        (r"^(conv1|bn1)\.", r"stem.\1."),
        (r"^layer1\.", "res2."),
        (r"^layer2\.", "res3."),
        (r"^layer3\.", "res4."),
        (r"^layer4\.", "res5."),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
    ),
}
_WITH_HEAD = ("copgen-model", "supcon")
_LEFT_OUT = {"torchvision": r"fc\.", "vissl": r"heads\.", "detectron2": r"stem\.fc\."}
"""Names of classifiers, which encoders here do not have: left out."""

_WRAPPERS = {"module", "trunk", "base_model"}
"""Parts of a name that come from parallel and wrapping modules."""

_PLACES = (
    (),
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("classy_state_dict", "base_model", "model", "trunk"),
    ("state", "method"),
    ("state", "model"),
)
"""Paths of dictionaries in checkpoints under which the tensors are."""


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder in torchvision's names, with its projection head and notes on the conversion."""

    encoder: dict[str, Tensor]
    head: dict[str, Tensor]
    """Projection head, `0.weight` to `2.bias`; empty when there is none."""
    config: EncoderConfig
    spelling: str
    notes: tuple[str, ...]
    """Tensors that were left out or added, as text."""


def spell(spelling: str, name: str) -> str:
    """The name in `spelling` of torchvision's `name`."""
    for pattern, replacement in _RULES[spelling]:
        name = re.sub(pattern, replacement, name)
    return name


def recognise(tree: Any, spelling: str = "auto") -> tuple[str, dict[str, Any]]:
    """Find an encoder's tensors in the content of a checkpoint.

    Args:
        spelling: the only one to look for, or `auto`.

    Returns:
        The spelling, and the tensors by their names without `module.` and the like.

    Raises:
        UsageError: none is there, or more than one; the message lists the first names.
    """
    wanted = [name for name in SPELLINGS if name != "copgen"] if spelling == "auto" else [spelling]
    places = [(place, names) for place in _PLACES if (names := _without_wrappers(_descend(tree, place))) is not None]
    found = [(name, place, names) for place, names in places for name in wanted if spell(name, "conv1.weight") in names]
    if len(found) == 1:
        return found[0][0], found[0][2]
    shown = _list(max((names for _, names in places), key=len, default={}))
    if not found:
        raise UsageError(f"no encoder by {' or '.join(wanted)} names is in it: its first names are {shown}")
    which = "; ".join(f"{name} at {'.'.join(place) or 'the top'}" for name, place, _ in found)
    raise UsageError(f"it is ambiguous ({which}): say which one with --from; its first names are {shown}")


def _descend(tree: Any, place: Iterable[str]) -> Any:
    for name in place:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _without_wrappers(tree: Any) -> dict[str, Any] | None:
    """Tensors by names without `module.` and the like; None if `tree` is no dictionary of tensors.

    Raises:
        UsageError: two names become one.
    """
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        return None
    if not any(isinstance(value, (Stored, Tensor)) for value in tree.values()):
        return None
    short: dict[str, str] = {}
    for name in tree:
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in short:
            raise UsageError(f"{short[bare]} and {name} are two tensors for one name, {bare}")
        short[bare] = name
    return {bare: tree[name] for bare, name in short.items()}


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_encoder(tree: Any, spelling: str = "auto") -> EncoderWeights:
    """The encoder in the content of a checkpoint; every tensor keeps its bits.

    Raises:
        UsageError: it is not recognised, or a tensor is missing, unknown, or of another shape; named.
    """
    found, source = recognise(tree, spelling)
    config = _architecture(source, found)
    template = _template(config)
    names = {spell(found, name): name for name in template}
    left_out = [name for name in source if re.match(_LEFT_OUT.get(found, "(?!)"), name)]
    heads = [name for name in source if found in _WITH_HEAD and name.startswith("head.")]
    unknown = source.keys() - names.keys() - set(left_out) - set(heads)
    counters = {theirs for theirs in names if theirs.endswith("num_batches_tracked")}
    absent = names.keys() - source.keys()
    missing = absent if absent - counters or absent != counters else set()
    if unknown or missing:
        what = [f"{text}: {_list(sorted(n))}" for text, n in (("missing", missing), ("not known", unknown)) if n]
        raise UsageError(f"it is no {config.name} by {found} names: {'; '.join(what)}")
    notes = [f"left out the classifier: {_list(left_out)}"] if left_out else []
    if absent:
        notes.append(f"added {len(absent)} counters num_batches_tracked = 0, which it does not hold")
    encoder = {
        name: _take(source[theirs], theirs, template[name]) if theirs in source else torch.tensor(0)
        for theirs, name in names.items()
    }
    return EncoderWeights(encoder, _head(source, heads, config), config, found, tuple(notes))


def _architecture(source: dict[str, Any], spelling: str) -> EncoderConfig:
    """Depth, width and stem, from which tensors there are and the first one's shape."""
    first = spell(spelling, "conv1.weight")
    shape = tuple(getattr(source[first], "shape", ()))
    if len(shape) != 4 or shape[2] not in (3, 7) or shape[0] % 8 or not 8 <= shape[0] <= 512:
        raise UsageError(f"{first} is {list(shape)}: no first layer of an encoder here")
    name = "resnet50" if spell(spelling, "layer1.0.conv3.weight") in source else "resnet18"
    return EncoderConfig(name=name, stem="imagenet" if shape[2] == 7 else "cifar", width=shape[0])


@functools.cache
def _template(config: EncoderConfig, model: Callable = Encoder) -> dict[str, Tensor]:
    """The state dict of an encoder: names, shapes and dtypes without values."""
    with torch.device("meta"):
        return model(config).state_dict()


def _head(source: dict[str, Any], names: list[str], config: EncoderConfig) -> dict[str, Tensor]:
    """The whole projection head, or nothing where there is none."""
    model = _template(config, ContrastiveModel) if names else {}
    wanted = {name: value for name, value in model.items() if name.startswith("head.")}
    if wanted.keys() != set(names):
        raise UsageError(f"its head has {_list(sorted(names))}; expected {_list(sorted(wanted))}")
    return {name.removeprefix("head."): _take(source[name], name, value) for name, value in wanted.items()}


def _take(value: Any, name: str, template: Tensor) -> Tensor:
    """A tensor, checked to have the template's shape and kind of dtype."""
    if not isinstance(value, (Stored, Tensor)):
        raise UsageError(f"{name} is no tensor")
    if tuple(value.shape) != tuple(template.shape):
        raise UsageError(f"{name} is {list(value.shape)}, expected {list(template.shape)}")
    tensor = value.read() if isinstance(value, Stored) else value
    if tensor.dtype.is_floating_point != template.dtype.is_floating_point:
        raise UsageError(f"{name} is {tensor.dtype}, expected {template.dtype}")
    return tensor


def write_encoder(
    weights: EncoderWeights, spelling: str, parallel: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in another spelling, and notes on what it leaves out.

    Args:
        parallel: name the encoder as within nn.DataParallel (SupConResNet on several GPUs: `encoder.module.`).

    Raises:
        UsageError: the spelling needs a head that is not there, or has no parallel names.
    """
    if parallel and spelling != "supcon":
        raise UsageError(f"--parallel: only supcon has such names, not {spelling}")
    if spelling == "copgen-model" and not weights.head:
        raise UsageError("--to copgen-model: the source has no projection head; use --to copgen")
    tensors = {spell(spelling, name): value for name, value in weights.encoder.items()}
    if parallel:
        tensors = {name.replace("encoder.", "encoder.module.", 1): value for name, value in tensors.items()}
    notes = []
    heads = {f"head.{name}": value for name, value in weights.head.items()}
    if spelling in _WITH_HEAD:
        tensors |= heads
        notes += [] if heads else ["without a projection head, which the source does not hold"]
    elif heads:
        notes.append(f"left out the projection head: {_list(heads)}")
    return tensors, notes


def wrap(spelling: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint in which readers of that spelling look for the tensors."""
    if spelling == "supcon":
        return {"model": tensors}
    if spelling == "vissl":
        return {"classy_state_dict": {"base_model": {"model": {"trunk": tensors, "heads": {}}}}}
    if spelling == "detectron2":
        return {"model": tensors, "__author__": "copgen_fast", "matching_heuristics": True}
    return tensors
