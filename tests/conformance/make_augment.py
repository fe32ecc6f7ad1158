"""Conformance vectors of the augmentation: images, parameters and torchvision's results.

    python tests/conformance/make_augment.py      # writes augment.npz beside this file

augment.npz scores any implementation, in any framework; tests/conformance/score.py does it for PyTorch.
Only torchvision, Pillow, torch and numpy made it; the same versions make the same bytes again.

Format
------
Cases come in groups, one for each input and output size: N cases, images of H x W, views of h x w, and blur
kernels of K = 2R + 1 weights. An array is named GROUP/ARRAY. Layout is NCHW, channels are R, G, B.

    input     images    uint8    [N, 3, H, W]  a float image is images / 255 in float32, so within [0, 1]
              crop      int64    [N, 4]        (top, left, height, width) in pixels, inside the image
              flip      bool     [N]
              order     int64    [N, 4]        0 brightness, 1 contrast, 2 saturation, 3 hue: order[n, 0] goes first
              factors   float32  [N, 4]        column k belongs to op k, wherever in the order it is applied
              jitter    bool     [N]           false: the four are skipped
              gray      bool     [N]
              sigma     float32  [N]           standard deviation of the blur in pixels of the view; 0 for none
              blur      float32  [N, K]        the same as weights along each axis, 0 .. 0 1 0 .. 0 for none
              solarize  float32  [N]           threshold in [0, 1]; infinity for none
              mean, std float32  [3]           normalisation of the group; 0 and 1 for none
              weights   int8     [N, 3, h, w]  of the functional whose gradient is taken; 0 at the kinks (below)
    expected  views     float32  [N, 3, h, w]
              gradient  float32  [N, 3, H, W]  of sum(weights * views), with respect to the float images
              pil       uint8    [N, 3, h, w]  only in groups of composed cases; see below
    labels    case      str      [N]           what the case is

Three more, without a group: torch, torchvision and pillow (str), the versions that made the file.

`views` are what torchvision's functions make of the float tensor, in this order:

1. the crop, resized to h x w: resized_crop, bilinear, antialias=True;
2. flip: hflip;
3. where jitter, in the given order: adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue, each
   clamped to [0, 1]. One with a neutral factor (1, or 0 for the hue) is left out, as ColorJitter does;
4. gray: rgb_to_grayscale to three channels;
5. sigma > 0: gaussian_blur with K x K weights;
6. solarize: 1 - x where x >= threshold, channel by channel;
7. (x - mean) / std.

uint8 images give the same views. `pil` is steps 1 to 6 by the same functions on Pillow images of uint8, which
round after every step: no implementation in floating point equals it, but a faithful one stays close.

Views should agree to 1e-5 and gradients to 1e-4 of their norm, case by case. Where channels tie, the first takes the
gradient of the maximum and of the minimum. Other kinks are left out of the gradient: whether a clamp passes it to
a value of exactly 0 or 1 depends on the version of torch (2.12 does, 2.14 does not), so no image has such
values but the palette's, whose pixels with them weigh nothing. Images and views one pixel wide are left out too:
torch 2.14's antialiased resize gets them wrong on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

PATH = Path(__file__).with_name("augment.npz")
PARAMETERS = ("crop", "flip", "order", "factors", "jitter", "gray", "sigma", "blur", "solarize")
OPS: dict[int, Callable] = {0: F.adjust_brightness, 1: F.adjust_contrast, 2: F.adjust_saturation, 3: F.adjust_hue}

Arrays = dict[str, np.ndarray]

# Chosen so that no case sits at a kink by chance: two channels that tie after a resize, a hue on a sextant's border.
_SEED = 20221135
_NAMES = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# What torchvision does.


def view(image: Tensor | Image.Image, row: dict[str, Tensor], out_size: Sequence[int], kernel: int) -> Any:
    """Steps 1 to 6 for one image, float in [0, 1] or Pillow's, and its row of every parameter."""
    x = F.resized_crop(image, *row["crop"].tolist(), list(out_size), F.InterpolationMode.BILINEAR, antialias=True)
    x = F.hflip(x) if row["flip"] else x
    factors = row["factors"].tolist()
    for op in row["order"].tolist() if row["jitter"] else ():
        x = OPS[op](x, factors[op]) if factors[op] != _NEUTRAL[op] else x
    x = F.rgb_to_grayscale(x, 3) if row["gray"] else x
    sigma, threshold = row["sigma"].item(), row["solarize"].item()
    x = F.gaussian_blur(x, [kernel, kernel], [sigma, sigma]) if sigma else x
    if threshold == math.inf:
        return x
    return F.solarize(x, threshold if isinstance(x, Tensor) else 255 * threshold)


def tensor_augment(
    images: Tensor, params: dict[str, Tensor], out_size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """All seven steps by torchvision's float tensors, a view for each of [N, 3, H, W]."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    kernel = params["blur"].shape[1]
    rows = ({name: params[name][i] for name in PARAMETERS} for i in range(len(x)))
    views = [view(image, row, out_size, kernel) for image, row in zip(x, rows, strict=True)]
    return torch.stack([F.normalize(x, list(mean), list(std)) for x in views])


def pil_augment(images: Tensor, params: dict[str, Tensor], out_size: Sequence[int]) -> Tensor:
    """Steps 1 to 6 by Pillow: uint8 [N, 3, H, W] -> uint8 [N, 3, h, w]."""
    kernel = params["blur"].shape[1]
    rows = ({name: params[name][i] for name in PARAMETERS} for i in range(len(images)))
    views = (view(F.to_pil_image(image), row, out_size, kernel) for image, row in zip(images, rows, strict=True))
    return torch.stack([F.pil_to_tensor(x) for x in views])


# Images.


def noise(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """Uniform in 1 .. 254, and no two channels of a pixel alike."""
    levels = rng.integers(1, 255, (n, 3, height, width), dtype=np.uint8)
    while (tied := np.diff(np.sort(levels, axis=1), axis=1).min(axis=1, keepdims=True) == 0).any():
        levels = np.where(tied, rng.integers(1, 255, levels.shape, dtype=np.uint8), levels)
    return levels


def palette(rng: np.random.Generator) -> np.ndarray:
    """[3, 8, 8]: every colour of the levels 0, 80, 170, 255: black, white, grays, pure colours, tied channels."""
    colours = np.array(list(itertools.product((0, 80, 170, 255), repeat=3)), dtype=np.uint8)
    return rng.permutation(colours).T.reshape(3, 8, 8)


def smooth(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """Waves of ten pixels and more in 1 .. 254: what a photograph looks like from near."""
    y, x = np.mgrid[:height, :width]
    fy, fx, phase = rng.uniform(-0.6, 0.6, (3, n, 3, 1, 1))
    return (127.5 + 126 * np.sin(fy * y + fx * x + 6 * phase)).round().astype(np.uint8)


# Groups of cases.


def neutral(n: int, size: Sequence[int], kernel: int = 1) -> Arrays:
    """Parameters that change nothing."""
    blur = np.zeros((n, kernel), np.float32)
    blur[:, kernel // 2] = 1
    return {
        "crop": np.tile(np.array([0, 0, *size], np.int64), (n, 1)),
        "flip": np.zeros(n, bool),
        "order": np.tile(np.arange(4), (n, 1)),
        "factors": np.tile(np.array(_NEUTRAL, np.float32), (n, 1)),
        "jitter": np.ones(n, bool),
        "gray": np.zeros(n, bool),
        "sigma": np.zeros(n, np.float32),
        "blur": blur,
        "solarize": np.full(n, np.inf, np.float32),
    }


def set_blur(params: Arrays, sigma: np.ndarray) -> None:
    """Blur the cases whose `sigma` is positive, with as many weights as `params` has room for."""
    kernel = params["blur"].shape[1]
    offset = np.arange(kernel) - kernel // 2
    drawn = sigma > 0
    gaussian = np.exp(-0.5 * (offset / np.where(drawn, sigma, 1)[:, None]) ** 2)
    params["sigma"] = sigma.astype(np.float32)
    params["blur"] = np.where(drawn[:, None], gaussian / gaussian.sum(1, keepdims=True), params["blur"])
    params["blur"] = params["blur"].astype(np.float32)


def single_ops(rng: np.random.Generator) -> Arrays:
    """Each op alone, on noise and on the palette: 8 x 8 -> 8 x 8."""
    factors = {name: (0.0, 0.4, 0.6, 0.9, 1.1, 1.4, 2.0) for name in _NAMES[:3]}
    # Shifts that turn a primary colour to another one, or half-way round, put the palette on kinks of the hue.
    shifts = {"noise": (-0.5, -1 / 3, -0.1, -0.01, 0.07, 0.1, 1 / 3, 0.5), "palette": (-0.43, -0.1, 0.07, 0.1, 0.27)}
    rows: list[tuple[str, str, float]] = []
    for kind in ("noise", "palette"):
        rows += [(kind, name, f) for name, values in (factors | {"hue": shifts[kind]}).items() for f in values]
        rows += [(kind, "solarize", threshold) for threshold in (0.0, 0.25, 0.5, 1.0)]
        rows += [(kind, name, 1) for name in ("identity", "flip", "gray")]
    params = neutral(len(rows), (8, 8))
    for i, (_, name, value) in enumerate(rows):
        if name in _NAMES:
            params["factors"][i, _NAMES.index(name)] = value
        elif name != "identity":
            params[name][i] = value
    images = np.stack([noise(rng, 1, 8, 8)[0] if kind == "noise" else palette(rng) for kind, *_ in rows])
    labels = [f"{name} {value:.3g}, {kind}" for kind, name, value in rows]
    return {"images": images, "case": np.array(labels), **params}


def orders(rng: np.random.Generator) -> Arrays:
    """Every order of the four, factors strong enough for all their clamps: 7 x 9 -> 7 x 9."""
    order = np.array(list(itertools.permutations(range(4))))
    params = neutral(len(order), (7, 9)) | {"order": order}
    strong = np.array([0.5, 0.5, 0.5, 0.2])
    params["factors"] = (_NEUTRAL + strong * rng.choice((-1, 1), (24, 4)) * rng.uniform(0.6, 1, (24, 4))).astype("f4")
    labels = [", ".join(_NAMES[op] for op in row) for row in order]
    return {"images": noise(rng, 24, 7, 9), "case": np.array(labels), **params}


def crops(rng: np.random.Generator, size: tuple[int, int], boxes: Sequence[Sequence[int]]) -> Arrays:
    """Crops alone, every other one flipped."""
    params = neutral(len(boxes), size)
    params["crop"][:] = boxes
    params["flip"][1::2] = True
    labels = [f"crop {box}{', flipped' * int(flip)}" for box, flip in zip(boxes, params["flip"], strict=True)]
    return {"images": noise(rng, len(boxes), *size), "case": np.array(labels), **params}


def blurs(rng: np.random.Generator, kernel: int) -> Arrays:
    """Blurs of one width: 9 x 11 -> 9 x 11; one case without, one solarised after it."""
    sigma = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 1.0])
    params = neutral(6, (9, 11), kernel)
    set_blur(params, sigma)
    params["solarize"][5] = 0.5
    labels = [f"blur {s:g} of {kernel} pixels{', solarize' * (i == 5)}" for i, s in enumerate(sigma)]
    return {"images": noise(rng, 6, 9, 11), "case": np.array(labels), **params}


def normalised(rng: np.random.Generator) -> Arrays:
    """Only normalised."""
    images = np.stack([noise(rng, 1, 8, 8)[0], palette(rng)])
    return {"images": images, "case": np.array(["normalize, noise", "normalize, palette"]), **neutral(2, (8, 8))}


def composed(rng: np.random.Generator, n: int, name: str, strength: float, kernel: int = 1) -> Arrays:
    """SimCLR's policy, its jitter multiplied by `strength`; it blurs and solarises too if there is a `kernel`."""
    size = (15, 13)
    params = neutral(n, size, kernel)
    sides = np.stack([rng.integers(side * 45 // 100, side + 1, n) for side in size], 1)
    corner = rng.integers(0, np.array(size) - sides + 1)
    params["crop"] = np.concatenate([corner, sides], 1)
    params["order"] = rng.permuted(params["order"], axis=1)
    params["factors"] = (_NEUTRAL + strength * rng.uniform(-1, 1, (n, 4)) * (0.4, 0.4, 0.4, 0.1)).astype(np.float32)
    for gate, probability in {"flip": 0.5, "jitter": 0.8, "gray": 0.2}.items():
        params[gate] = rng.random(n) < probability
    if kernel > 1:
        set_blur(params, np.where(rng.random(n) < 0.5, rng.uniform(0.1, 2, n), 0))
        params["solarize"][rng.random(n) < 0.5] = 0.5
    images = np.concatenate([noise(rng, n // 2, *size), smooth(rng, n - n // 2, *size)])
    labels = [f"{name} {i}, {'noise' if i < n // 2 else 'smooth'}" for i in range(n)]
    return {"images": images, "case": np.array(labels), **params}


def groups(rng: np.random.Generator) -> Iterator[tuple[str, Arrays, tuple[int, int], tuple, bool]]:
    """(name, inputs and labels, size of the views, mean and std, whether Pillow's result is wanted)."""
    boxes = [(0, 0, 11, 14), (1, 2, 4, 9), (9, 12, 2, 2), (3, 0, 5, 11), (2, 3, 7, 9), (0, 4, 11, 3)]
    yield "ops", single_ops(rng), (8, 8), _PLAIN, False
    yield "orders", orders(rng), (7, 9), _PLAIN, False
    yield "normalize", normalised(rng), (8, 8), _IMAGENET, False
    for out_size in ((7, 9), (5, 23), (16, 16)):
        yield "crop-{}x{}".format(*out_size), crops(rng, (11, 14), boxes), out_size, _PLAIN, False
    yield "crop-shrunk", crops(rng, (33, 29), [(0, 0, 33, 29), (4, 1, 29, 23)]), (4, 6), _PLAIN, False
    for kernel in (3, 7):
        yield f"blur-{kernel}", blurs(rng, kernel), (9, 11), _PLAIN, False
    yield "simclr", composed(rng, 24, "simclr", 1.0), (13, 11), _IMAGENET, True
    yield "simclr-strong", composed(rng, 12, "simclr-strong", 2.0, kernel=5), (13, 11), _IMAGENET, True


# The file.


def make() -> Arrays:
    """Every array of the file by its name."""
    rng = np.random.default_rng(_SEED)
    made = {
        "torch": np.array(torch.__version__.split("+")[0]),
        "torchvision": np.array(torchvision.__version__.split("+")[0]),
        "pillow": np.array(PIL.__version__),
    }
    for name, group, out_size, (mean, std), pil in groups(rng):
        n = len(group["case"])
        group["mean"], group["std"] = np.array(mean, np.float32), np.array(std, np.float32)
        group["weights"] = rng.integers(-9, 10, (n, 3, *out_size), dtype=np.int8)
        if out_size == group["images"].shape[2:]:
            # A pixel at a clamp's bound; only whole images have any.
            group["weights"] *= ~np.isin(group["images"], (0, 255)).any(axis=1, keepdims=True)
        images = torch.from_numpy(group["images"])
        params = {field: torch.from_numpy(group[field]) for field in PARAMETERS}
        leaf = (images.float() / 255).requires_grad_()
        views = tensor_augment(leaf, params, out_size, mean, std)
        (gradient,) = torch.autograd.grad(views, leaf, torch.from_numpy(group["weights"]).float())
        group["views"], group["gradient"] = views.detach().numpy(), gradient.numpy()
        if pil:
            group["pil"] = pil_augment(images, params, out_size).numpy()
        made |= {f"{name}/{array}": values for array, values in group.items()}
    return made


if __name__ == "__main__":
    made = make()
    np.savez_compressed(PATH, **made)
    count = sum(len(values) for name, values in made.items() if name.endswith("/case"))
    print(f"{PATH}: {count} cases, {PATH.stat().st_size / 1000:.0f} kB")
