"""Batched, differentiable augmentation from parameters drawn beforehand: a function and a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from copgen_fast.ops.augment import reference
from copgen_fast.ops.augment.operator import FIELDS, expect_valid, fused_augment, fused_filter
from copgen_fast.ops.augment.params import AugmentParams, AugmentPolicy, as_size, as_statistics
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import as_count, expect_intensities, expect_tensor, readable
from copgen_fast.ops.derivatives import backend_for

__all__ = ["Augment", "AugmentParams", "AugmentPolicy", "augment"]

_LAYOUTS = (torch.contiguous_format, torch.channels_last)
_CLAMPS = ("exact", "straight_through")
_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def augment(
    images: Tensor,
    params: AugmentParams,
    out_size: int | tuple[int, int],
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    clamp: str = "exact",
    check_range: bool | None = None,
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
    4. where `params.gray`, three channels of gray(x); with RandAugment, after it instead;
    5. the blur: a separable filter, borders reflected; after it, `rand_augment` by `params.rand_augment`;
    6. 1 - x where x >= `params.solarize`, up to rounding, channel by channel;
    7. (x - mean) / std, if given.

    A fused backend does all of it in one pass forward and one backward, besides a small one for the mean that the
    contrast needs; a blur and RandAugment add their own. For the backward it keeps `images` alone, a mask of a solarise
    after a blur, and what RandAugment keeps. Second and forward-mode derivatives and torch.func's transforms are the
    reference's.

    Args:
        images: [N, 3, H, W], uint8 in 0..255 or floating in [0, 1], any memory format, N >= 0.
        params: of V N views of images of this size, on the same device; view v is of image v mod N.
        out_size: (h, w), or one side length.
        mean, std: three numbers each, both or neither; a tensor on a GPU is waited for.
        out_dtype: floating dtype of the result. The arithmetic is in float32, or float64 for float64 images.
        memory_format: of the result, torch.contiguous_format or torch.channels_last.
        clamp: "exact" (no gradient where a clamp reaches 0 or 1, as torchvision) or "straight_through" (the same
            values, and the gradient passes every clamp unchanged).
        check_range: whether floating images with values outside [0, 1], but for rounding, are refused. None: on the
            CPU alone, where C++ looks at the crops' pixels on the way; on a GPU, True waits for it.
        backend: a name from `backends()`; None takes the fastest. The reference resizes by matrix products
            under PyTorch's own settings, so on a GPU TF32 applies where it was switched on.

    Returns:
        [V N, 3, h, w] of `out_dtype`. NaN stays, in all channels of its pixel where the saturation or hue changes, and
        makes the whole view NaN where the contrast does. It may spread further by factors of 0: in Triton's kernels to
        all channels wherever colours change, in C++ to neighbours, in the reference to all of a jittered view.

    Raises:
        TypeError: images that are not a tensor of an accepted dtype, an `out_dtype` that is not floating.
        ValueError: another shape, a batch or device that does not fit the params, a bad size, mean, std,
            clamp, memory format or backend; values out of range; and, on the CPU, a crop that leaves the image or an
            order that is no permutation (on a GPU, whose values are not read, the view of such a row is NaN).
    """
    expect_tensor("images", images, ("N", 3, "H", "W"), _DTYPES)
    size = as_size("out_size", out_size)
    _expect_params(params, images, size)
    if mean is not None or std is not None:
        mean, std = as_statistics(mean, std)
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype: expected a floating dtype, got {out_dtype}")
    if memory_format not in _LAYOUTS:
        raise ValueError(f"memory_format: expected one of {', '.join(map(str, _LAYOUTS))}, got {memory_format}")
    if clamp not in _CLAMPS:
        raise ValueError(f"clamp: expected one of {', '.join(_CLAMPS)}, got {clamp!r}")
    backend = backend_for(resolve("augment", images.device, backend), backend, images)
    straight_through = clamp == "straight_through"
    if backend != "cpp" and (readable(images) if check_range is None else check_range):
        expect_intensities("images", images)
    in_cpp = check_range is not False
    if backend == "reference":
        if not torch.compiler.is_compiling():
            expect_valid(images, params.crop, params.order)
        views = reference.augment(images, params, size, mean, std, straight_through)
        return views.to(out_dtype, memory_format=memory_format)

    drawn = [getattr(params, name) for name in FIELDS]
    neutral = ((0.0,) * 3, (1.0,) * 3)
    last = memory_format == torch.channels_last
    rand = params.rand_augment
    if params.blur.shape[1] == 1 and rand is None:
        statistics = neutral if mean is None else (mean, std)
        return fused_augment(images, *drawn, size, *statistics, out_dtype, last, straight_through, backend, in_cpp)[0]
    # A blur reads neighbouring pixels, so it and what follows are separate launches.
    drawn[-1] = torch.full_like(params.solarize, torch.inf)
    if rand is not None:
        drawn[-2] = torch.zeros_like(params.gray)
    arithmetic = torch.promote_types(images.dtype, torch.float32)
    views, _ = fused_augment(images, *drawn, size, *neutral, arithmetic, False, straight_through, backend, in_cpp)
    if params.blur.shape[1] > 1:
        views = fused_filter(views, params.blur, False, backend)
    if rand is not None:
        views = reference.randomize(views, rand, params.gray, straight_through)
    return reference.finish(views, params.solarize, mean, std).to(out_dtype, memory_format=memory_format)


class Augment(nn.Module):
    """Random augmentation of batches by a policy: `Augment(policy, 128)(images)` replaces a torchvision pipeline.

    Args:
        views: number of views of each image, made in one launch.
        out_dtype, memory_format, clamp, check_range, backend: as `augment` takes them.
    """

    def __init__(
        self,
        policy: AugmentPolicy,
        out_size: int | tuple[int, int],
        *,
        views: int = 1,
        out_dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        clamp: str = "exact",
        check_range: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.out_size = policy, as_size("out_size", out_size)
        self.views = as_count("views", views, lowest=1)
        self.out_dtype, self.memory_format = out_dtype, memory_format
        self.clamp, self.check_range, self.backend = clamp, check_range, backend

    def forward(
        self, images: Tensor, params: AugmentParams | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Views [V N, 3, h, w], normalised by the policy, of images [N, 3, H, W]; view v is of image v mod N.

        Without `params` they are drawn from `generator` (None: the images' device's default one).
        """
        if params is None:
            expect_tensor("images", images, ("N", 3, "H", "W"), _DTYPES)
            params = AugmentParams.sample(
                self.views * len(images),
                tuple(images.shape[2:]),
                self.policy,
                out_size=self.out_size,
                generator=generator,
                device=images.device,
            )
        return augment(
            images,
            params,
            self.out_size,
            mean=self.policy.mean,
            std=self.policy.std,
            out_dtype=self.out_dtype,
            memory_format=self.memory_format,
            clamp=self.clamp,
            check_range=self.check_range,
            backend=self.backend,
        )

    def __getstate__(self) -> dict[str, object]:
        # Protocol 2 of pickle, which torch.save uses, knows no memory format.
        return self.__dict__ | {"memory_format": str(self.memory_format)}

    def __setstate__(self, state: dict[str, object]) -> None:
        memory_format = getattr(torch, state["memory_format"].removeprefix("torch."))
        super().__setstate__(state | {"memory_format": memory_format})

    def extra_repr(self) -> str:
        return f"{self.policy}, out_size={self.out_size}, views={self.views}"


def _expect_params(params: AugmentParams, images: Tensor, out_size: tuple[int, int]) -> None:
    views, n = len(params), len(images)
    if views != n and (n == 0 or views == 0 or views % n):
        raise ValueError(f"params: {views} rows for {n} images; expected a multiple, a row for each view")
    if params.crop.device != images.device:
        raise ValueError(f"params: on {params.crop.device}, but images are on {images.device}")
    radius = params.blur.shape[1] // 2
    if radius >= min(out_size):
        raise ValueError(f"params: a blur of radius {radius} needs views of more pixels a side, got {list(out_size)}")
