"""RandAugment with Pillow's 8-bit operations, from parameters drawn beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.ops.derivatives import transformed
from copgen_fast.ops.rand_augment import reference
from copgen_fast.ops.rand_augment.operator import compiled_rand_augment
from copgen_fast.ops.rand_augment.params import OPERATIONS, RandAugmentParams, RandAugmentPolicy, matrices

__all__ = ["OPERATIONS", "RandAugmentParams", "RandAugmentPolicy", "rand_augment"]

_CLAMPS = ("exact", "straight_through")


def rand_augment(
    images: Tensor, params: RandAugmentParams, *, clamp: str = "exact", backend: str | None = None
) -> Tensor:
    """Apply each image's own operations with the values that Pillow gives 8-bit images; differentiable.

    An image with an operation is rounded to 255ths first; one without stays as it is. Look-ups, Color and Sharpness
    equal Pillow's to the bit. Rotations, shears and translations interpolate in single instead of double precision, so
    that a pixel may fall one level short or long.

    The gradient is that of the operations on real numbers: rounding passes it unchanged, Equalize too, and the
    ends of the range that AutoContrast stretches count as constants.

    Args:
        images: floating [N, 3, H, W] in [0, 1].
        params: of N views, on the images' device.
        clamp: "exact" (no gradient where a result is clipped to 0 or 255) or "straight_through" (the same values, and
            the gradient passes every clip unchanged).
        backend: a name from `backends()`; None takes the fastest. Where a gradient is needed the reference runs.

    Returns:
        [N, 3, H, W] of the images' dtype. An image with a NaN is NaN all over where it has an operation.

    Raises:
        TypeError: images that are not a floating tensor.
        ValueError: another shape, or params of another number of images or on another device.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    if len(params) != len(images) or params.operation.device != images.device:
        raise ValueError(
            f"params: {len(params)} rows on {params.operation.device} for {len(images)} images on {images.device}"
        )
    if clamp not in _CLAMPS:
        raise ValueError(f"clamp: expected one of {', '.join(_CLAMPS)}, got {clamp!r}")
    differentiated = (torch.is_grad_enabled() and images.requires_grad) or transformed(images)
    if resolve("rand_augment", images.device, backend) == "reference" or differentiated:
        return reference.rand_augment(images, params, clamp == "straight_through")
    wide = images.to(torch.promote_types(images.dtype, torch.float32)).contiguous()
    affine = matrices(params, *images.shape[2:])
    fields = (params.operation, params.argument, params.cubic)
    return compiled_rand_augment(wide, *fields, affine).to(images.dtype)
