"""Weights of StyleGAN2 in the files of NVIDIA's PyTorch releases and of rosinality's port, by NVIDIA's names.

NVIDIA's .pkl is a pickled dictionary with the modules G, D and G_ema, whose classes come as source text, which is not
run. What is no tensor but changes images (clamps, blocks' kind) is read from the modules' attributes. A state dict
without them is taken to be trained as the releases' defaults are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.generators._stylegan2_layers import Mapping, Shape, low_pass_filter
from copgen_fast.runtime import artifacts, latents, weights
from copgen_fast.runtime.unpickle import Content, Shell

_OURS = ("synthesis.b4.const", "synthesis.b4.conv1.weight", "mapping.fc0.weight")
_PORT = ("input.input", "conv1.conv.weight", "style.1.weight")
_OTHERS = {
    "tflib": "a network of TensorFlow: convert it by legacy.py of github.com/NVlabs/stylegan2-ada-pytorch",
    "synthesis.input.freqs": "a StyleGAN3, which is another network",
    "SE.net.0.weight": "a network of the package stylegan2-pytorch, which computes otherwise than NVIDIA's",
}
"""Other networks that are easily taken for one, by a part of a name of a tensor or class."""
_HARMLESS = {"dnnlib.util.EasyDict"}
"""Classes beside tensors and modules that NVIDIA's files hold: a dictionary."""
_LARGEST = 4096
_CLAMP = 256.0
"""Limit of layers' outputs in NVIDIA's training in float16, its default."""
_AVERAGED_OVER = 4096


def read_weights(path: Path) -> tuple[Shape, dict[str, Tensor]]:
    """The sizes of a network and its state dict by NVIDIA's names.

    Raises:
        UsageError: the file does not hold such a network, or one of another architecture.
        CorruptArtifactError, CopgenError: it is damaged, or names something that such files do not need.
    """
    content = weights.read(path)
    names = weights.flatten(content.tree)
    if any(name.endswith(_PORT[0]) for name in names) and not any(name.endswith(_OURS[0]) for name in names):
        prefix, tensors = weights.select(content.tree, _PORT, path)
        return _from_port(tensors, content.tree, prefix, path)
    if not any(name.endswith(_OURS[0]) for name in names):
        known = (kind for part, kind in _OTHERS.items() if any(part in name for name in (*names, *content.unknown)))
        found = next(known, None) or weights.describe(content.tree, names)
        raise UsageError(f"{path} holds no StyleGAN2 but {found}; expected {', '.join(_OURS)}, ...")
    prefix, tensors = weights.select(content.tree, _OURS, path)
    return _shape(tensors, _attributes(content, prefix, path), path), tensors


def _attributes(content: Content, prefix: str, path: Path) -> dict[str, Any]:
    """Fields of a `Shape` by the attributes of a pickled generator; for a state dict the releases' defaults."""
    module: Any = content.tree
    for part in filter(None, prefix.split(".")):
        module = module[part] if isinstance(module, dict) else None
    if not isinstance(module, Shell):
        return {"clamp": _CLAMP}
    if foreign := sorted(set(content.unknown) - _HARMLESS):
        raise CopgenError(f"{path} was refused: it names {foreign[0]}, which no StyleGAN2 needs; nothing of it was run")
    layers = dict(_modules(module))
    _expect({"lrelu"}, "activation", layers, r"mapping\.fc\d+|.*\.conv[01]", path)
    _expect({"skip"}, "architecture", layers, r"synthesis\.b\d+", path)
    clamps = {
        layer.state.get("conv_clamp") for name, layer in layers.items() if re.search(r"\.(conv[01]|torgb)$", name)
    }
    rates = {layer.state.get("bias_gain", 0.01) for name, layer in layers.items() if re.search(r"\.fc\d+$", name)}
    for values, what in ((clamps - {None}, "conv_clamp"), (rates, "bias_gain")):
        if any(not isinstance(value, (int, float)) or not value > 0 for value in values):
            raise UsageError(f"{path}: {what} is {values}, expected a number above 0")
    if len(clamps) > 1 or len(rates) > 1:
        raise UsageError(
            f"{path}: its layers differ in conv_clamp ({clamps}) or bias_gain ({rates}), which is not read"
        )
    halves = sum(layer.state.get("use_fp16") is True for layer in layers.values())
    return {"clamp": next(iter(clamps), None), "rate": next(iter(rates), 0.01)} | (
        {"half_blocks": halves} if halves else {}
    )


def _modules(module: Shell, prefix: str = "") -> Iterator[tuple[str, Shell]]:
    """The modules in a pickled one by dotted name; `weights.flatten` has checked that none is in two places."""
    for name, child in module.state.get("_modules", {}).items():
        if isinstance(child, Shell):
            yield prefix + name, child
            yield from _modules(child, f"{prefix}{name}.")


def _expect(values: set, attribute: str, layers: dict[str, Shell], names: str, path: Path) -> None:
    for name, layer in layers.items():
        value = layer.state.get(attribute)
        if re.fullmatch(names, name) and value is not None and value not in values:
            raise UsageError(
                f"{path}: {name} has {attribute} {value!r}, expected {' or '.join(values)}, as StyleGAN2 has"
            )


def _shape(tensors: dict[str, Tensor], attributes: dict[str, Any], path: Path) -> Shape:
    def size(name: str, axis: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= axis:
            raise UsageError(f"{path} does not fit StyleGAN2: missing {name}")
        return tensors[name].shape[axis]

    sides = sorted({int(found[1]) for name in tensors if (found := re.match(r"synthesis\.b(\d{1,5})\.", name))})
    if sides != [4 * 2**i for i in range(len(sides))] or sides[-1] > _LARGEST:
        raise UsageError(f"{path} does not fit StyleGAN2: blocks for {sides} pixels, not 4, 8, .. {_LARGEST}")
    if "synthesis.b4.torgb.weight" not in tensors:
        raise UsageError(
            f"{path}: its blocks don't each give an image (missing torgb), as those of architecture skip do"
        )
    layers = 1
    while f"mapping.fc{layers}.weight" in tensors:
        layers += 1
    mapping = tuple(size(f"mapping.fc{i}.weight") for i in range(layers))
    embedding, classes = (size("mapping.embed.weight", i) if "mapping.embed.weight" in tensors else 0 for i in (0, 1))
    z_dim = size("mapping.fc0.weight", 1) - embedding
    colours = size("synthesis.b4.torgb.weight")
    if z_dim < 1:
        raise UsageError(f"{path} does not fit StyleGAN2: mapping.fc0.weight has no place for z beside the classes")
    if colours not in (1, 3):
        raise UsageError(f"{path}: images of {colours} channels, expected 3, or 1 for grey ones")
    return Shape(
        channels=tuple(size(f"synthesis.b{side}.conv1.weight") for side in sides),
        z_dim=z_dim,
        mapping=mapping,
        classes=classes,
        colours=colours,
        noise="synthesis.b4.conv1.noise_const" in tensors,
        embedding=embedding or None,
        **attributes,
    )


def _from_port(tensors: dict[str, Tensor], tree: Any, prefix: str, path: Path) -> tuple[Shape, dict[str, Tensor]]:
    """The tensors of the port by NVIDIA's names: it has a gain on weights of convolutions, and 4 times the filters."""
    blocks = sum(bool(re.fullmatch(r"to_rgbs\.\d+\.bias", name)) for name in tensors)
    if 4 * 2**blocks > _LARGEST:
        raise UsageError(f"{path} does not fit StyleGAN2: {blocks} blocks after the first, for over {_LARGEST} pixels")
    left, found = dict(tensors), {}
    if not any(name.startswith("noises.") for name in tensors):  # the port's first files: it draws some when it starts
        print(f"{path} holds no noise: it is drawn, the same in each run", flush=True)
        sides = [4 * 2 ** ((i + 1) // 2) for i in range(2 * blocks + 1)]
        left |= {f"noises.noise_{i}": latents.sample("normal", i, (1, 1, side, side)) for i, side in enumerate(sides)}

    def take(name: str, to: str, change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        if name not in left:
            raise UsageError(f"{path} does not fit StyleGAN2: missing {prefix}{name}")
        try:
            found[to] = change(left.pop(name)).clone()
        except (RuntimeError, IndexError) as error:
            raise UsageError(f"{path} does not fit StyleGAN2: {prefix}{name} is {list(tensors[name].shape)}") from error

    def dense(name: str, to: str) -> None:
        for part in ("weight", "bias"):
            take(f"{name}.{part}", f"{to}.{part}")

    def conv(name: str, to: str, layer: int, up: bool) -> None:
        take(f"{name}.conv.weight", f"{to}.weight", lambda x: x.squeeze(0) / math.sqrt(x[0, 0].numel()))
        dense(f"{name}.conv.modulation", f"{to}.affine")
        take(f"{name}.activate.bias", f"{to}.bias")
        take(f"{name}.noise.weight", f"{to}.noise_strength", lambda x: x.reshape(()))
        take(f"noises.noise_{layer}", f"{to}.noise_const", lambda x: x[0, 0])
        found[f"{to}.resample_filter"] = low_pass_filter()
        if up:
            take(f"{name}.conv.blur.kernel", f"{to}.resample_filter", lambda x: x / 4)

    def to_rgb(name: str, to: str, up: bool) -> None:
        take(f"{name}.conv.weight", f"{to}.torgb.weight", lambda x: x.squeeze(0))
        dense(f"{name}.conv.modulation", f"{to}.torgb.affine")
        take(f"{name}.bias", f"{to}.torgb.bias", torch.Tensor.flatten)
        found[f"{to}.resample_filter"] = low_pass_filter()
        if up:
            take(f"{name}.upsample.kernel", f"{to}.resample_filter", lambda x: x / 4)

    for i in range(sum(bool(re.fullmatch(r"style\.\d+\.weight", name)) for name in tensors)):
        dense(f"style.{i + 1}", f"mapping.fc{i}")
    take("input.input", "synthesis.b4.const", lambda x: x.squeeze(0))
    conv("conv1", "synthesis.b4.conv1", 0, False)
    to_rgb("to_rgb1", "synthesis.b4", False)
    for i in range(blocks):
        block = f"synthesis.b{8 * 2**i}"
        conv(f"convs.{2 * i}", f"{block}.conv0", 2 * i + 1, True)
        conv(f"convs.{2 * i + 1}", f"{block}.conv1", 2 * i + 2, False)
        to_rgb(f"to_rgbs.{i}", block, True)
    average = weights.flatten(tree).get("latent_avg")
    shape = _shape(found, {}, path)
    if average is None:
        mapping = {name.removeprefix("mapping."): value for name, value in found.items() if name.startswith("mapping.")}
        found["mapping.w_avg"] = _average(Mapping(shape), mapping, path)
    else:
        average = weights.tensor(average)  # in pSp's files once for each layer
        found["mapping.w_avg"] = average[0] if average.ndim == 2 else average
    return shape, found | left  # what is left is unexpected, which load_strictly names


def _average(mapping: Mapping, tensors: dict[str, Tensor], path: Path) -> Tensor:
    """The average w of seeded latents, as the port computes it where a training checkpoint lacks it."""
    artifacts.load_strictly(mapping, {**tensors, "w_avg": mapping.w_avg}, path)
    z = latents.sample("normal", 0, (_AVERAGED_OVER, mapping.fc0.weight.shape[1])).double()
    with torch.no_grad():
        return mapping.double()(z).mean(0).float()
