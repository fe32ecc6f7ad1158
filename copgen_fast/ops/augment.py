"""Batched augmentation: a whole pipeline, differentiable, from parameters drawn beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from copgen_fast.checks import expect_tensor
from copgen_fast.ops import augment_reference
from copgen_fast.ops.augment_params import AugmentParams, AugmentPolicy, as_size, expect_statistics
from copgen_fast.ops.backend import resolve

__all__ = ["Augment", "AugmentParams", "AugmentPolicy", "augment"]

_IMPLEMENTATIONS = {"reference": augment_reference.augment}
_CLAMPS = ("exact", "straight_through")
_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def augment(
    images: Tensor,
    params: AugmentParams,
    out_size: int | tuple[int, int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    clamp: str = "exact",
    backend: str | None = None,
) -> Tensor:
    """Crop, flip, colour-jitter, gray and normalise a batch; differentiable with respect to `images`.

    In this order, image by image, with the arithmetic of torchvision's float tensors:

    1. the crop, resized to `out_size`: bilinear, pixel centres, antialiased where it shrinks;
    2. the horizontal flip;
    3. where `params.jitter`, in the order of `params.order` and clamped to [0, 1] after each (the hue stays
       within the image's range by itself):
       brightness f x; contrast f x + (1 - f) mean(gray(x)), the mean over the cropped image;
       saturation f x + (1 - f) gray(x); hue h -> (h + f) mod 1 in HSV.
       gray = 0.2989 R + 0.587 G + 0.114 B. A neutral factor (1, or 0 for the hue) leaves an image as it is;
    4. where `params.gray`, three channels of gray(x);
    5. (x - mean) / std, if given.

    Args:
        images: [N, 3, H, W], uint8 in 0..255 or floating in [0, 1], any memory format, N >= 0.
        params: of N images of this size, on the same device.
        out_size: (h, w), or one side length.
        mean, std: three numbers each, both or neither.
        out_dtype: floating dtype of the result. The arithmetic is in float32, or float64 for float64 images.
        memory_format: of the result.
        clamp: "exact" (no gradient where a clamp saturates, as torchvision) or "straight_through" (the same
            values, and the gradient passes every clamp unchanged).
        backend: a name from `backends()`; None takes the fastest. The reference resizes by matrix products
            under PyTorch's own settings, so on a GPU TF32 applies where it was switched on.

    Returns:
        [N, 3, h, w] of `out_dtype`.

    Raises:
        TypeError: images that are not a tensor of an accepted dtype, an `out_dtype` that is not floating.
        ValueError: another shape, a batch or device that is not that of the params, a bad size, mean, std,
            clamp or backend; and, checked on the CPU only, where no waiting is needed: a crop that leaves
            the image, an order that is no permutation.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"), _DTYPES)
    _expect_params(params, images)
    size = as_size("out_size", out_size)
    if mean is not None or std is not None:
        expect_statistics(mean, std)
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype: expected a floating dtype, got {out_dtype}")
    if clamp not in _CLAMPS:
        raise ValueError(f"clamp: expected one of {', '.join(_CLAMPS)}, got {clamp!r}")
    run = _IMPLEMENTATIONS[resolve("augment", images.device, backend)]
    views = run(images, params, size, mean, std, straight_through=clamp == "straight_through")
    return views.to(out_dtype, memory_format=memory_format)


class Augment(nn.Module):
    """A policy as a module, for batches: `Augment(policy, 128)(images)` in place of a torchvision pipeline."""

    def __init__(self, policy: AugmentPolicy, out_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.policy = policy
        self.out_size = as_size("out_size", out_size)

    def forward(
        self, images: Tensor, params: AugmentParams | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Views float32 [N, 3, h, w], normalised by the policy, of images [N, 3, H, W]; see `augment`.

        Without `params` they are drawn from `generator` (None: the images' device's default one).
        """
        if params is None:
            expect_tensor("images", images, ("N", 3, "H", "W"), _DTYPES)
            params = AugmentParams.sample(
                len(images), tuple(images.shape[2:]), self.policy, generator=generator, device=images.device
            )
        return augment(images, params, self.out_size, mean=self.policy.mean, std=self.policy.std)

    def extra_repr(self) -> str:
        return f"{self.policy}, out_size={self.out_size}"


def _expect_params(params: AugmentParams, images: Tensor) -> None:
    if len(params) != len(images):
        raise ValueError(f"params: {len(params)} rows for {len(images)} images")
    if params.crop.device != images.device:
        raise ValueError(f"params: on {params.crop.device}, but images are on {images.device}")
    if images.device.type != "cpu":
        return
    height, width = images.shape[2:]
    top, left, h, w = params.crop.unbind(1)
    inside = (top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)
    if not inside.all():
        row = int(inside.int().argmin())
        raise ValueError(
            f"params: crop {params.crop[row].tolist()} (top, left, height, width) of image {row} leaves the "
            f"{height} x {width} image"
        )
    if not (params.order.sort(dim=1).values == torch.arange(4)).all():
        raise ValueError("params: an order is no permutation of 0, 1, 2, 3")
