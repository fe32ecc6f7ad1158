"""Peers of the augmentation: kornia, torchvision by image and by batch, our PyTorch reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional, v2

from bench.baselines import optional
from copgen_fast import __version__
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment
from copgen_fast.runtime.machine import version

Peer = Callable[[Tensor], Tensor]

_JITTER = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


def fixed_peers(policy: AugmentPolicy, side: int, params: AugmentParams) -> dict[str, Peer]:
    """Peers that apply given `params`, as far as each can treat samples apart."""
    kornia, torchvision = _names()
    found: dict[str, Peer] = {}
    with optional("kornia"):
        found[f"{kornia}, same parameters, one jitter order a batch"] = kornia_fixed(policy, side, params)
    found |= {
        f"{torchvision} per-sample loop, same parameters": torchvision_fixed(policy, side, params),
        f"{torchvision} v2 whole batch, one sample's parameters": torchvision_batch_fixed(policy, side, params),
        f"copgen_fast {__version__} reference backend, same parameters": reference(policy, side, params),
    }
    if policy.crop_scale is not None and version("kornia"):
        found[f"{kornia} crop by warp, other pixel centres"] = kornia_fixed(policy, side, params, "resample")
    return found


def drawing_peers(policy: AugmentPolicy, side: int) -> dict[str, Peer]:
    """Peers that draw parameters at each call, from the same distributions."""
    kornia, torchvision = _names()
    found: dict[str, Peer] = {}
    with optional("kornia"):
        found[f"{kornia}, one jitter order a batch"] = kornia_drawing(policy, side)
    found |= {
        f"{torchvision} per-sample loop": torchvision_drawing(policy, side),
        f"{torchvision} v2 whole batch, one draw for all": torchvision_batch_drawing(policy, side),
    }
    if policy.crop_scale is not None and version("kornia"):
        found[f"{kornia} crop by warp, other pixel centres"] = kornia_drawing(policy, side, "resample")
    return found


def _names() -> tuple[str, str]:
    return f"kornia {version('kornia')}", f"torchvision {version('torchvision')}"


def reference(policy: AugmentPolicy, side: int, params: AugmentParams) -> Peer:
    def run(images: Tensor) -> Tensor:
        dtype = _floating(images)
        return augment(images, params, side, mean=policy.mean, std=policy.std, out_dtype=dtype, backend="reference")

    return run


def torchvision_fixed(policy: AugmentPolicy, side: int, params: AugmentParams) -> Peer:
    """torchvision's functions on one image tensor after the other, with its row of `params`."""
    rows = _rows(params)

    def run(images: Tensor) -> Tensor:
        return torch.stack([_apply(functional, x, row, policy, side) for x, row in zip(images, rows, strict=True)])

    return run


def torchvision_batch_fixed(policy: AugmentPolicy, side: int, params: AugmentParams) -> Peer:
    """torchvision v2's functions on all images at once, with the first row of `params` that changes colours."""
    rows = _rows(params)
    row = next((row for row in rows if row["jitter"]), rows[0])
    return lambda images: _apply(v2.functional, images, row, policy, side)


def torchvision_drawing(policy: AugmentPolicy, side: int) -> Peer:
    """A Compose called for each image tensor, as in the reference code."""
    pipeline = compose(transforms, policy, side)
    return lambda images: torch.stack([pipeline(_to_float(x)) for x in images])


def torchvision_batch_drawing(policy: AugmentPolicy, side: int) -> Peer:
    pipeline = compose(v2, policy, side)
    return lambda images: pipeline(_to_float(images))


def kornia_drawing(policy: AugmentPolicy, side: int, cropping: str = "slice") -> Peer:
    pipeline = _kornia(policy, side, cropping)
    return lambda images: pipeline(_to_float(images))


def kornia_fixed(policy: AugmentPolicy, side: int, params: AugmentParams, cropping: str = "slice") -> Peer:
    """kornia with `params`; the first row's order of the jitter is that of the batch."""
    pipeline = _kornia(policy, side, cropping)
    replay = pipeline.forward_parameters(torch.Size((len(params), 3, side, side)))
    top, left, height, width = params.crop.float().cpu().unbind(1)
    right, bottom = left + width - 1, top + height - 1
    corners = torch.stack([left, top, right, top, right, bottom, left, bottom], 1).view(-1, 4, 2)
    given = {
        "RandomResizedCrop": {"src": corners},
        "RandomHorizontalFlip": {"batch_prob": params.flip},
        "ColorJitter": {"batch_prob": params.jitter, "order": params.order[0]}
        | {f"{name.removeprefix('adjust_')}_factor": params.factors[:, i] for i, name in enumerate(_JITTER)},
        "RandomGrayscale": {"batch_prob": params.gray},
        "RandomGaussianBlur": {"batch_prob": _blurred(params), "sigma": _sigma(params)},
        "RandomSolarize": {"batch_prob": params.solarize.isfinite()},
    }
    for item in replay:
        for name, value in given.get(item.name.rpartition("_")[0], {}).items():
            item.data[name] = value.cpu().to(item.data[name].dtype)
    return lambda images: pipeline(_to_float(images), params=replay)


def _kornia(policy: AugmentPolicy, side: int, cropping: str) -> torch.nn.Module:
    """The policy as kornia's pipeline; `cropping` is "slice", sample by sample, or "resample", one warp a batch."""
    from kornia import augmentation as K

    steps: list[torch.nn.Module] = []
    if policy.crop_scale is not None:
        # With align_corners=False slices have torchvision's pixel centres; a warp never has.
        crop = {"align_corners": False, "cropping_mode": cropping}
        steps.append(K.RandomResizedCrop((side, side), policy.crop_scale, policy.crop_ratio, **crop))
    if policy.flip:
        steps.append(K.RandomHorizontalFlip(policy.flip))
    if policy.jitter:
        # Not ColorJiggle: this is the one with torchvision's formulas.
        steps.append(K.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue, p=policy.jitter))
    if policy.gray:
        steps.append(K.RandomGrayscale(p=policy.gray))
    if policy.blur:
        steps.append(K.RandomGaussianBlur((_taps(side),) * 2, policy.blur_sigma, p=policy.blur))
    if policy.solarize:
        threshold = (policy.solarize_threshold,) * 2
        steps.append(K.RandomSolarize(threshold, (0.0, 0.0), p=policy.solarize))
    steps.append(K.Normalize(torch.tensor(policy.mean), torch.tensor(policy.std)))
    return K.AugmentationSequential(*steps, data_keys=["input"], same_on_batch=False)


def compose(module: ModuleType, policy: AugmentPolicy, side: int, pictures: bool = False) -> Peer:
    """The policy as a Compose of torchvision.transforms or its v2, for tensors or for PIL pictures."""
    steps = []
    if policy.crop_scale is not None:
        steps.append(module.RandomResizedCrop(side, policy.crop_scale, policy.crop_ratio))
    if policy.flip:
        steps.append(module.RandomHorizontalFlip(policy.flip))
    if policy.jitter:
        jitter = module.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
        steps.append(module.RandomApply([jitter], p=policy.jitter))
    if policy.gray:
        steps.append(module.RandomGrayscale(policy.gray))
    if policy.blur:
        steps.append(module.RandomApply([module.GaussianBlur(_taps(side), policy.blur_sigma)], p=policy.blur))
    if policy.solarize:
        steps.append(module.RandomSolarize(policy.solarize_threshold, policy.solarize))
    if pictures:
        steps.append(module.ToTensor())
    return module.Compose([*steps, module.Normalize(policy.mean, policy.std)])


def _apply(f: ModuleType, x: Tensor, row: dict, policy: AugmentPolicy, side: int) -> Tensor:
    """Apply one row of parameters to [3, H, W] or [N, 3, H, W] by torchvision's functions or v2's."""
    x = _to_float(x)
    if policy.crop_scale is not None:
        x = f.resized_crop(x, *row["crop"], [side, side], antialias=True)
    if row["flip"]:
        x = f.hflip(x)
    if row["jitter"]:
        for op in row["order"]:
            x = getattr(f, _JITTER[op])(x, row["factors"][op])
    if row["gray"]:
        x = f.rgb_to_grayscale(x, 3)
    if row["blurred"]:
        x = f.gaussian_blur(x, [row["taps"]] * 2, [row["sigma"]] * 2)
    if row["solarize"] < math.inf:
        x = f.solarize(x, row["solarize"])
    return f.normalize(x, policy.mean, policy.std)


def _rows(params: AugmentParams) -> list[dict]:
    """The parameters as Python numbers, one dictionary a sample."""
    columns = {name: getattr(params, name).tolist() for name in ("crop", "flip", "order", "factors", "jitter", "gray")}
    columns |= {"blurred": _blurred(params).tolist(), "sigma": _sigma(params).tolist()}
    columns |= {"solarize": params.solarize.tolist(), "taps": [params.blur.shape[1]] * len(params)}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _blurred(params: AugmentParams) -> Tensor:
    return params.blur[:, params.blur.shape[1] // 2] < 1


def _sigma(params: AugmentParams) -> Tensor:
    """Standard deviations of the blur, from its weights at and beside the centre; 1 where there is no blur."""
    radius = params.blur.shape[1] // 2
    if radius == 0:
        return torch.ones(len(params))
    fall = params.blur[:, radius].double() / params.blur[:, radius - 1].double()
    sigma = (0.5 / fall.log()).sqrt()
    return torch.where(_blurred(params), sigma, 1.0)


def _taps(side: int) -> int:
    """Width of the blur's kernel, as AugmentPolicy states it."""
    return 2 * max(1, side // 20) + 1


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _floating(images: Tensor) -> torch.dtype:
    return torch.float32 if images.dtype == torch.uint8 else images.dtype
