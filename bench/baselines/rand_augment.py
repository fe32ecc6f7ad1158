"""Peers of RandAugment: torchvision's, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from copgen_fast.ops import RandAugmentParams
from copgen_fast.ops.rand_augment.params import FILL, NONE, OPERATIONS
from copgen_fast.runtime.machine import version

Peer = Callable[[Tensor], Tensor]


def peers(params: RandAugmentParams) -> dict[str, Peer]:
    """The same operations on images [N, 3, H, W] in [0, 1], which are rounded to 8 bits first."""
    name = f"torchvision {version('torchvision')} functions"
    return {
        f"{name}, image by image, same parameters": lambda x: by_image(x, _fixed(params)),
        f"{name}, PIL image by image, same parameters": lambda x: by_image(x, _fixed(params), pictures=True),
    }


def drawing_peers(steps: int) -> dict[str, Peer]:
    """torchvision's transform, which draws `steps` operations for each image, on images as `peers`."""
    name = f"torchvision {version('torchvision')} RandAugment"
    drawing = transforms.RandAugment(steps, magnitude=30, interpolation=InterpolationMode.BILINEAR, fill=list(FILL))
    return {
        f"{name}, image by image": lambda x: by_image(x, [drawing] * len(x)),
        f"{name}, PIL image by image": lambda x: by_image(x, [drawing] * len(x), pictures=True),
    }


def by_image(images: Tensor, change: list[Callable], pictures: bool = False) -> Tensor:
    """Each image by its own function, as an 8-bit tensor or a PIL picture."""
    found = []
    for image, of in zip((images * 255).round().byte(), change, strict=True):
        view = functional.pil_to_tensor(of(functional.to_pil_image(image))) if pictures else of(image)
        found.append(view.float() / 255)
    return torch.stack(found)


def _fixed(params: RandAugmentParams) -> list[Callable]:
    rows = zip(params.operation.tolist(), params.argument.tolist(), params.cubic.tolist(), strict=True)
    return [lambda image, row=row: _apply(image, row) for row in rows]


def _apply(image: Tensor, row: tuple[list, list, list]) -> Tensor:
    for number, value, cubic in zip(*row, strict=True):
        if number != NONE:
            image = _operation(image, OPERATIONS[number], value, cubic)
    return image


def _operation(image: Tensor, name: str, value: float, cubic: bool) -> Tensor:
    """torchvision's operation of that name; it has no SolarizeAdd, for which another look-up stands."""
    f, (_, height, width) = functional, functional.get_dimensions(image)
    cubic = cubic and not isinstance(image, Tensor)  # tensors have no bicubic warp
    kernel, fill = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR, list(FILL)
    degrees = math.degrees(math.atan(value))

    def affine(shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        return f.affine(image, 0.0, list(shift), 1.0, list(shear), kernel, fill)

    found = {
        "AutoContrast": lambda: f.autocontrast(image),
        "Equalize": lambda: f.equalize(image),
        "Invert": lambda: f.invert(image),
        "Rotate": lambda: f.rotate(image, value, kernel, fill=fill),
        "Posterize": lambda: f.posterize(image, int(value)),
        "Solarize": lambda: f.solarize(image, int(min(value, 255))),
        "SolarizeAdd": lambda: f.invert(image),
        "Color": lambda: f.adjust_saturation(image, value),
        "Contrast": lambda: f.adjust_contrast(image, value),
        "Brightness": lambda: f.adjust_brightness(image, value),
        "Sharpness": lambda: f.adjust_sharpness(image, value),
        "ShearX": lambda: affine(shear=(degrees, 0.0)),
        "ShearY": lambda: affine(shear=(0.0, degrees)),
        "TranslateX": lambda: affine(shift=(round(value * width), 0)),
        "TranslateY": lambda: affine(shift=(0, round(value * height))),
    }
    return found[name]()
