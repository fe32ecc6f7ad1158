"""The fused augmentation as PyTorch operators, for `torch.compile`, autograd and CUDA graphs.

Memory is allocated here, so that real and fake results agree; a backend only fills it. The backward keeps the images,
the parameters and one number a view, the pivot of its contrast; it computes again what the clamps need.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from copgen_fast.ops.augment import reference
from copgen_fast.ops.augment.params import AugmentParams
from copgen_fast.ops.backend import load
from copgen_fast.ops.checks import expect_intensities
from copgen_fast.ops.derivatives import differentiated_again, pull
from copgen_fast.ops.library import operator, register_autograd

# The tensors of AugmentParams that the operators and their backends take, in this order.
FIELDS = ("crop", "flip", "order", "factors", "jitter", "gray", "solarize")


@operator("augment")
def fused_augment(
    images: Tensor,
    crop: Tensor,
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    jitter: Tensor,
    gray: Tensor,
    solarize: Tensor,
    out_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
    channels_last: bool,
    straight_through: bool,
    backend: str,
    check_range: bool,
) -> tuple[Tensor, Tensor]:
    """Views [V N, 3, h, w] of checked images [N, 3, H, W] without the blur, and their contrast pivots [V N].

    The parameters are those of FIELDS. View v is of image v mod N. A pivot is the mean luminance that the contrast
    blends with, 0 where there is none.
    """
    views, pivot = _allocate(images, crop, out_size, out_dtype, channels_last)
    expect_valid(images, crop, order)
    if views.numel():
        drawn = (crop, flip, order, factors, jitter, gray, solarize)
        forward = load(backend, "augment").augment_forward
        outside = forward(images, *drawn, mean=mean, std=std, views=views, pivot=pivot)
        if outside and check_range:  # C++ looks at the pixels that it loads; Triton would have to be waited for
            expect_intensities("images", images)
    return views, pivot


def _allocate(
    images: Tensor, crop: Tensor, out_size: Sequence[int], out_dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    n = crop.shape[0]  # len would fix it in a compiled graph
    views = torch.empty((n, 3, *out_size), dtype=out_dtype, device=images.device, memory_format=layout)
    return views, torch.empty(n, dtype=torch.promote_types(images.dtype, torch.float32), device=images.device)


@register_fake(fused_augment)
def _(images: Tensor, crop: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, out_size, _, _, out_dtype, channels_last, _, _, _ = rest
    return _allocate(images, crop, out_size, out_dtype, channels_last)


@operator("augment_backward")
def fused_augment_backward(
    grad: Tensor,
    images: Tensor,
    crop: Tensor,
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    jitter: Tensor,
    gray: Tensor,
    solarize: Tensor,
    pivot: Tensor,
    std: Sequence[float],
    straight_through: bool,
    backend: str,
) -> Tensor:
    """Gradient with respect to the images, in their dtype and layout, of the views' gradient [V N, 3, h, w]."""
    grad_images = torch.empty_like(images)
    if grad.numel():
        drawn = (crop, flip, order, factors, jitter, gray, solarize)
        backward = load(backend, "augment").augment_backward
        backward(grad, images, *drawn, pivot=pivot, std=std, straight_through=straight_through, grad_images=grad_images)
    return grad_images


register_fake(fused_augment_backward, lambda grad, images, *_: torch.empty_like(images))


def _setup_augment(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.std, _, _, ctx.straight_through, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for it would cost a launch


def _augment_vjp(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    of_others = (None,) * (len(FIELDS) + 8)
    if grad is None:
        return None, *of_others
    tensors, options = ctx.saved_tensors, (ctx.std, ctx.straight_through)
    if differentiated_again(grad):
        images, *drawn, _ = tensors
        return _by_definition(grad, images, drawn, *options), *of_others
    return fused_augment_backward(grad, *tensors, *options, ctx.backend), *of_others


register_autograd(fused_augment, _augment_vjp, _setup_augment)


def _by_definition(
    grad: Tensor, images: Tensor, drawn: Sequence[Tensor], std: Sequence[float], straight_through: bool
) -> Tensor:
    params = AugmentParams(**dict(zip(FIELDS, drawn, strict=True)), blur=drawn[-1].new_ones(len(drawn[-1]), 1))
    size = (grad.shape[2], grad.shape[3])

    def views(x: Tensor) -> Tensor:
        return reference.augment(x, params, size, (0.0,) * 3, tuple(std), straight_through).to(grad.dtype)

    return pull(views, (images,), grad)[0]


@operator("separable_filter")
def fused_filter(images: Tensor, weights: Tensor, transposed: bool, backend: str) -> Tensor:
    """Contiguous [N, 3, h, w] filtered along both axes by each sample's own weights [N, 2R + 1], borders reflected.

    R < min(h, w). `transposed` applies the adjoint, which is the backward.
    """
    images = images.contiguous()
    filtered = torch.empty_like(images)
    if images.numel():
        load(backend, "augment").separable_filter(images, weights, transposed, filtered)
    return filtered


register_fake(fused_filter, lambda images, *_: torch.empty_like(images, memory_format=torch.contiguous_format))


def _setup_filter(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.transposed, ctx.backend = inputs[2], inputs[3]


def _filter_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weights,) = ctx.saved_tensors
    if differentiated_again(grad):
        filtered = partial(reference.separable_filter, weights=weights)
        # Its adjoint's adjoint is the filter.
        return filtered(grad) if ctx.transposed else pull(filtered, (grad,), grad)[0], None, None, None
    return fused_filter(grad, weights, not ctx.transposed, ctx.backend), None, None, None


register_autograd(fused_filter, _filter_vjp, _setup_filter)


def expect_valid(images: Tensor, crop: Tensor, order: Tensor) -> None:
    """Raise ValueError for a crop that leaves its image or an order that is no permutation.

    On the CPU only: reading the values of another device would wait for it, and its kernels write NaN instead.
    """
    if crop.device.type != "cpu":
        return
    height, width = images.shape[2:]
    top, left, h, w = crop.unbind(1)
    inside = (top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)
    if not inside.all():
        row = int(inside.int().argmin())
        raise ValueError(
            f"params: crop {crop[row].tolist()} (top, left, height, width) of view {row} leaves the "
            f"{height} x {width} image"
        )
    # Four numbers of 0..3 whose powers of two add up to 15 are all different.
    if ((order < 0) | (order > 3)).any() or ((1 << order).sum(1) != 15).any():
        raise ValueError("params: an order is no permutation of 0, 1, 2, 3")
