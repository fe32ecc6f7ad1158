"""Parameter names of encoders in torchvision, lightly, SupContrast, VISSL and detectron2, and their conversion.

`supcon` are those of GenRep's and COP-Gen's code, which has a `stem`; `shortcut` those of SupContrast itself and of the
CIFAR ResNets that it follows (pytorch-cifar).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel, Encoder
from copgen_fast.errors import UsageError
from copgen_fast.runtime import weights

Spelling = Literal["copgen", "copgen-model", "supcon", "shortcut", "torchvision", "sequential", "vissl", "detectron2"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)

# torchvision's name -> theirs, by regular expressions that are applied in order.
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "copgen": (),
    "torchvision": (),
    "copgen-model": ((r"^", "encoder."),),
    "supcon": ((r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"\.downsample\.", ".shortcut."), (r"^", "encoder.")),
    "shortcut": ((r"\.downsample\.", ".shortcut."),),
    "sequential": (
        (r"^conv1\.", "0."),
        (r"^bn1\.", "1."),
        (r"^layer1\.", "4."),
        (r"^layer2\.", "5."),
        (r"^layer3\.", "6."),
        (r"^layer4\.", "7."),
    ),
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
_LEFT_OUT = {"torchvision": r"fc\.", "shortcut": r"(fc|linear)\.", "vissl": r"heads\.", "detectron2": r"stem\.fc\."}
"""Names of classifiers, which encoders here do not have: left out."""

_HEADS = re.compile(r"(fc|heads?|classifier|proj\w*|pred\w*|mlp|neck|queue\w*|prototypes\w*)(\.|$)")
"""Names of what is trained on top of encoders: left out, where it lies beside their layers."""

WRAPPERS = {*weights.WRAPPERS, "trunk", "base_model"}
"""Parts of a name that come from parallel and wrapping modules."""

_MOMENTUM = re.compile(r"(encoder_k|momentum|target)", re.IGNORECASE)
_FIRST, _DEEP = "conv1.weight", "layer4.0.downsample.0.weight"
"""Two weights that every encoder has. No two spellings share both names; they show the prefix of a file's names."""


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
    prefix: str = ""
    """What stands before the encoder's names, but for parts of wrapping modules."""


def spell(spelling: str, name: str) -> str:
    """The name in `spelling` of torchvision's `name`."""
    for pattern, replacement in _RULES[spelling]:
        name = re.sub(pattern, replacement, name)
    return name


class Found(NamedTuple):
    """An encoder in a checkpoint: whose names it has, what stands before them, its tensors without that, all others."""

    spelling: str
    prefix: str
    tensors: weights.Tensors
    beside: list[str]


def recognise(tree: Any, spelling: str = "auto", prefix: str | None = None) -> Found:
    """Find an encoder's tensors in the content of a checkpoint, in any dictionary and under any prefix.

    Args:
        spelling: the only one to look for, or `auto`.
        prefix: what stands before the encoder's names, for files that hold several; None: whatever it is. Of an
            encoder and its momentum copy (MoCo's, BYOL's) the former is taken.

    Raises:
        UsageError: none is there, or more than one; the message lists the first names.
    """
    names = weights.flatten(tree, WRAPPERS)
    wanted = [name for name in SPELLINGS if name != "copgen"] if spelling == "auto" else [spelling]
    found: dict[str, tuple[str, str]] = {}  # by the name of the first layer, as some spellings extend others
    for candidate in sorted(wanted, key=lambda name: len(spell(name, _FIRST))):
        for before in _prefixes(names, candidate):
            if prefix is None or f".{before}".endswith(f".{_bare(prefix)}"):
                found[before + spell(candidate, _FIRST)] = candidate, before
    if len(found) > 1:
        found = {name: value for name, value in found.items() if not _MOMENTUM.search(value[1])} or found
    shown = _list(names)
    if not found:
        where = "" if prefix is None else f" under {prefix}"
        raise UsageError(f"no encoder by {' or '.join(wanted)} names is in it{where}: its first names are {shown}")
    if len(found) > 1:
        which = "; ".join(f"{name} at {before.rstrip('.') or 'the top'}" for name, before in found.values())
        raise UsageError(
            f"it is ambiguous ({which}): say which one with --prefix or --from; its first names are {shown}"
        )
    ((candidate, before),) = found.values()
    tensors = {name.removeprefix(before): value for name, value in names.items() if name.startswith(before)}
    return Found(candidate, before, tensors, [name for name in names if not name.startswith(before)])


def _prefixes(names: weights.Tensors, spelling: str) -> list[str]:
    """What stands before the names of encoders in this spelling."""
    first, deep = spell(spelling, _FIRST), spell(spelling, _DEEP)
    found = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
    found = [prefix for prefix in found if prefix + deep in names]
    if spelling != "copgen-model":
        return found
    beside = [{name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)} for prefix in found]
    # Else it is an encoder in torchvision's names that happens to be called `encoder`.
    return [prefix for prefix, parts in zip(found, beside, strict=True) if parts <= {"encoder", "head"}]


def _bare(prefix: str) -> str:
    return "".join(f"{part}." for part in prefix.split(".") if part and part not in WRAPPERS)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_encoder(tree: Any, spelling: str = "auto", prefix: str | None = None) -> EncoderWeights:
    """The encoder in the content of a checkpoint; every tensor keeps its bits. See `recognise`.

    Raises:
        UsageError: it is not recognised, or a tensor is missing, unknown, or of another shape; named.
    """
    found, before, source, beside = recognise(tree, spelling, prefix)
    config = _architecture(source, found)
    template = _template(config)
    names = {spell(found, name): name for name in template}
    left_out = [name for name in source if re.match(_LEFT_OUT.get(found, "(?!)"), name)]
    heads = [name for name in source if found in _WITH_HEAD and name.startswith("head.")]
    above = [name for name in source if found not in _WITH_HEAD and _HEADS.match(name) and name not in left_out]
    beside = above + beside
    unknown = source.keys() - names.keys() - set(left_out) - set(heads) - set(beside)
    counters = {theirs for theirs in names if theirs.endswith("num_batches_tracked")}
    absent = names.keys() - source.keys()
    missing = absent if absent - counters or absent != counters else set()
    if unknown or missing:
        what = [f"{text}: {_list(sorted(n))}" for text, n in (("missing", missing), ("not known", unknown)) if n]
        raise UsageError(f"it is no {config.name} by {found} names: {'; '.join(what)}")
    notes = [f"left out the classifier: {_list(left_out)}"] if left_out else []
    if beside:
        notes.append(f"left out what lies beside the encoder: {_list(beside)}")
    if absent:
        notes.append(f"added {len(absent)} counters num_batches_tracked = 0, which it does not hold")
    encoder = {
        name: _take(source[theirs], theirs, template[name]) if theirs in source else torch.tensor(0)
        for theirs, name in names.items()
    }
    return EncoderWeights(encoder, _head(source, heads, config), config, found, tuple(notes), before)


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
    if tuple(value.shape) != tuple(template.shape):
        raise UsageError(f"{name} is {list(value.shape)}, expected {list(template.shape)}")
    tensor = weights.tensor(value)
    if tensor.dtype.is_floating_point != template.dtype.is_floating_point:
        raise UsageError(f"{name} is {tensor.dtype}, expected {template.dtype}")
    return tensor


def write_encoder(found: EncoderWeights, spelling: str, parallel: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in another spelling, and notes on what it leaves out.

    Args:
        parallel: name the encoder as within nn.DataParallel (SupConResNet on several GPUs: `encoder.module.`).

    Raises:
        UsageError: the spelling needs a head that is not there, or has no parallel names.
    """
    if parallel and spelling != "supcon":
        raise UsageError(f"--parallel: only supcon has such names, not {spelling}")
    if spelling == "copgen-model" and not found.head:
        raise UsageError("--to copgen-model: the source has no projection head; use --to copgen")
    tensors = {spell(spelling, name): value for name, value in found.encoder.items()}
    if parallel:
        tensors = {name.replace("encoder.", "encoder.module.", 1): value for name, value in tensors.items()}
    notes = []
    heads = {f"head.{name}": value for name, value in found.head.items()}
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
