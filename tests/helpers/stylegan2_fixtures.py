"""Small StyleGAN2s, their images written straight from the paper's equations, and files in others' layouts."""

import collections
import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

from copgen_fast.generators._stylegan2_layers import Block, Shape, StyledConv
from copgen_fast.generators.stylegan2 import Config, StyleGAN2

CHANNELS = (7, 5, 6, 3, 4, 3, 2)


def small_stylegan2(side=32, dtype=torch.float64, seed=0, z_dim=6, mapping=(9, 5), config=Config(), **shape):  # noqa: B008
    """Every number of it matters: no bias, noise or average is left at its start."""
    torch.manual_seed(seed)
    blocks = int(math.log2(side)) - 1
    generator = StyleGAN2(Shape(CHANNELS[:blocks], z_dim, mapping, **shape), config)
    for name, value in generator.state_dict().items():
        if name.endswith(("bias", "noise_strength", "w_avg")):
            value.add_(0.3 * torch.randn(value.shape))
        elif name.endswith("torgb.weight"):
            value.mul_(0.4)
        elif name.endswith("resample_filter"):  # unlike the usual one, this one isn't symmetric
            value.mul_(torch.rand(4, 4) + 0.5)
    return generator.to(dtype).eval().requires_grad_(False)


def dense(state, name, x, rate=1.0):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return x @ (weight * rate / weight.shape[1] ** 0.5).T + bias * rate


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x) * 2**0.5


def unit(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def mapped(state, z, labels=None, psi=1.0):
    """w [N, W] of z: section 2 of Karras et al. 2019, with the release's normalisation and truncation."""
    x = unit(z)
    if labels is not None:
        embedded = state["mapping.embed.weight"].T[labels] / len(state["mapping.embed.weight"].T) ** 0.5
        x = torch.cat([x, unit(embedded + state["mapping.embed.bias"])], 1)
    i = 0
    while f"mapping.fc{i}.weight" in state:
        x = leaky(dense(state, f"mapping.fc{i}", x, 0.01))
        i += 1
    return state["mapping.w_avg"] + psi * (x - state["mapping.w_avg"])


def convolved(x, kernel, crop, size):
    """True convolution of one image [C, H, W] by [O, C, k, k]; of its full result, rows and columns from `crop` on."""
    k = kernel.shape[-1]
    full = F.conv2d(F.pad(x[None], (k, k, k, k)), kernel.flip(2, 3))[0, :, 1:-1, 1:-1]
    return full[:, crop : crop + size, crop : crop + size]


def stuffed(x):
    """[C, H, W] to [C, 2H, 2W], with zeros between."""
    out = x.new_zeros(len(x), x.shape[1], 2, x.shape[2], 2)
    out[:, :, 0, :, 0] = x
    return out.reshape(len(x), 2 * x.shape[1], 2 * x.shape[2])


def styled(state, name, x, w, noise, clamp):
    """A convolution with its weight modulated (equation 1) and demodulated (equation 3) for each image alone."""
    weight = state[f"{name}.weight"]
    style = dense(state, f"{name}.affine", w)
    images = []
    for image, scale in zip(x, style, strict=True):
        own = weight * scale[:, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        side = image.shape[1]
        if name.endswith("conv0"):  # upsampled: the kernel and the low-pass filter in one
            taps = 4 * state[f"{name}.resample_filter"]
            both = F.conv2d(own.flatten(0, 1)[:, None], taps.flip(0, 1)[None, None], padding=3)
            images.append(convolved(stuffed(image), both.view(*own.shape[:2], 6, 6), 2, 2 * side))
        else:
            images.append(convolved(image, own.flip(2, 3), 1, side))
    x = torch.stack(images)
    if noise:
        x = x + state[f"{name}.noise_const"] * state[f"{name}.noise_strength"]
    x = leaky(x + state[f"{name}.bias"][:, None, None])
    return x if clamp is None else x.clamp(-clamp, clamp)


def stylegan2(state, ws, noise=True, clamp=None):
    """Images by a state dict of the release's names, w of every layer [N, K, W]: skip outputs (figure 7b)."""
    x, image, layer, side = state["synthesis.b4.const"].expand(len(ws), -1, -1, -1), None, 0, 4
    while f"synthesis.b{side}.conv1.weight" in state:
        block = f"synthesis.b{side}"
        for conv in ("conv0", "conv1")[side == 4 :]:
            x = styled(state, f"{block}.{conv}", x, ws[:, layer], noise, clamp)
            layer += 1
        weight = state[f"{block}.torgb.weight"][:, :, 0, 0]
        scale = dense(state, f"{block}.torgb.affine", ws[:, layer]) / weight.shape[1] ** 0.5
        added = torch.einsum("oc,nc,nchw->nohw", weight, scale, x) + state[f"{block}.torgb.bias"][:, None, None]
        added = added if clamp is None else added.clamp(-clamp, clamp)
        if image is not None:
            taps = 4 * state[f"{block}.resample_filter"][None, None]
            channels = [torch.stack([convolved(stuffed(one[None]), taps, 1, side)[0] for one in few]) for few in image]
            added = torch.stack(channels) + added
        image, side = added, 2 * side
    return image.clamp(-1, 1).expand(-1, 3, -1, -1)


class EasyDict(dict):
    """As dnnlib's."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file was run")


HOMES = {"dnnlib": ("util", EasyDict), "torch_utils": ("persistence", _reconstruct_persistent_obj)}
"""What NVIDIA's pickles refer to beside torch: package -> (module, class or function)."""
for _package, (_module, _member) in HOMES.items():
    _member.__module__ = f"{_package}.{_module}"


class Persistent:
    """An object that pickles as the release's persistent classes do."""

    def __init__(self, name, state, source):
        self.name, self.state, self.source = name, state, source

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


def persistent(module, source, **changed):
    """A module of ours as one of the release's, with the attributes of its classes."""
    names = {"StyleGAN2": "Generator", "Mapping": "MappingNetwork", "Dense": "FullyConnectedLayer"}
    names |= {"StyledConv": "SynthesisLayer", "ToRGB": "ToRGBLayer", "Block": "SynthesisBlock"}
    kind = type(module).__name__
    state = {"training": False, "_init_args": (), "_init_kwargs": EasyDict(synthesis_kwargs=EasyDict(num_fp16_res=1))}
    for part in ("_parameters", "_buffers"):
        state[part] = collections.OrderedDict(getattr(module, part))
    state["_non_persistent_buffers_set"] = set()
    state["_modules"] = collections.OrderedDict(
        (name, persistent(child, source, **changed)) for name, child in module.named_children()
    )
    if isinstance(module, StyledConv):
        state |= {"activation": "lrelu", "up": 1 + module.up, "use_noise": module.noisy, "act_gain": np.sqrt(2)}
    if hasattr(module, "clamp"):
        state["conv_clamp"] = module.clamp
    if hasattr(module, "rate"):
        state["bias_gain"] = module.rate
    if isinstance(module, Block):
        state |= {"architecture": "skip", "use_fp16": module.torgb.clamp is not None}
    state |= {key: value for key, value in changed.items() if key in state}
    return Persistent(names.get(kind, kind), state, source)


def write_pickle(path, generator, monkeypatch, source="raise SystemExit('run')", beside=None, protocol=4, **changed):
    """A snapshot in the layout of StyleGAN2-ADA's release; `changed`: attributes of modules, where they have them."""
    for package, (name, member) in HOMES.items():
        module = types.ModuleType(f"{package}.{name}")
        setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    training = EasyDict(class_name="training.dataset.ImageFolderDataset", resolution=32)
    other = small_stylegan2(generator.image_shape[1], generator.mapping.w_avg.dtype, 1)
    content = {"G": persistent(other, source), "D": None, "G_ema": persistent(generator, source, **changed)}
    content |= {"augment_pipe": None, "training_set_kwargs": training} | (beside or {})
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def port_state(generator):
    """The state dict of rosinality's port for a float32 generator: its names, shapes and gains."""
    state, found = generator.state_dict(), {}

    def move(name, to, change=lambda x: x):
        found[to] = change(state[name])

    def layer(name, to, i):
        move(f"{name}.weight", f"{to}.conv.weight", lambda x: (x * x[0].numel() ** 0.5)[None])
        move(f"{name}.affine.weight", f"{to}.conv.modulation.weight")
        move(f"{name}.affine.bias", f"{to}.conv.modulation.bias")
        move(f"{name}.noise_strength", f"{to}.noise.weight", lambda x: x[None])
        move(f"{name}.bias", f"{to}.activate.bias")
        move(f"{name}.noise_const", f"noises.noise_{i}", lambda x: x[None, None])
        if name.endswith("conv0"):
            move(f"{name}.resample_filter", f"{to}.conv.blur.kernel", lambda x: 4 * x)

    def colour(name, to):
        move(f"{name}.torgb.weight", f"{to}.conv.weight", lambda x: x[None])
        move(f"{name}.torgb.affine.weight", f"{to}.conv.modulation.weight")
        move(f"{name}.torgb.affine.bias", f"{to}.conv.modulation.bias")
        move(f"{name}.torgb.bias", f"{to}.bias", lambda x: x[None, :, None, None])
        if to != "to_rgb1":
            move(f"{name}.resample_filter", f"{to}.upsample.kernel", lambda x: 4 * x)

    for i in range(generator.mapping.layers):
        for part in ("weight", "bias"):
            move(f"mapping.fc{i}.{part}", f"style.{i + 1}.{part}")
    move("synthesis.b4.const", "input.input", lambda x: x[None])
    layer("synthesis.b4.conv1", "conv1", 0)
    colour("synthesis.b4", "to_rgb1")
    for i, side in enumerate(generator.synthesis.sides[1:]):
        for j in (0, 1):
            layer(f"synthesis.b{side}.conv{j}", f"convs.{2 * i + j}", 2 * i + j + 1)
        colour(f"synthesis.b{side}", f"to_rgbs.{i}")
    return found
