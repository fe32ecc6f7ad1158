"""Argument checks of public functions; their messages name the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import SupportsIndex

import torch
from torch import Tensor


def expect_tensor(
    argument: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: Collection[torch.dtype] | None = None,
) -> Tensor:
    """Check that `value` is a tensor of the given shape and one of the given dtypes, and return it.

    Args:
        argument: the argument's name, for the message.
        shape: one entry per dimension; an int is an exact size, a str names a free one ("N", "H").
        dtypes: accepted dtypes; None accepts any floating-point dtype.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another number of dimensions, or another size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is None:
        if not value.dtype.is_floating_point:
            raise TypeError(f"{argument}: expected a floating-point tensor, got {value.dtype}")
    elif value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument}: expected {wanted}, got {value.dtype}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    for want, size in zip(shape, sizes, strict=False):
        fits = fits and (isinstance(want, str) or want == size)
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{argument}: expected shape [{wanted}], got {list(value.shape)}")
    return value


def as_count(argument: str, value: SupportsIndex, lowest: int = 0) -> int:
    """An integer of any type, NumPy's say, as an int; ValueError names `argument`."""
    # A compiled function knows symbolic integers, but not their __index__.
    whole = value if isinstance(value, int) else operator.index(value) if hasattr(value, "__index__") else None
    if whole is None or isinstance(whole, bool) or whole < lowest:
        raise ValueError(f"{argument}: expected an integer of at least {lowest}, got {value!r}")
    return whole


def readable(value: Tensor) -> bool:
    """Whether a check may look at values: on the CPU, where nothing has to be waited for, and outside of tracing."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return value.device.type == "cpu" and not traced


SLACK = 0.01
"""How far beyond [0, 1] intensities may be, as those of a generator in half precision are."""


def expect_intensities(argument: str, images: Tensor) -> None:
    """Raise ValueError for floating images with values outside of [0, 1]; waits for the device. NaN is passed on."""
    if not images.is_floating_point() or not images.numel():
        return
    low, high = (value.item() for value in images.detach().aminmax())
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"{argument}: expected values in [0, 1], got some from {low:.4g} to {high:.4g}; divide 0..255 by 255, map "
            "[-1, 1] by (x + 1) / 2, or take them as they are with check_range=False"
        )


def expect_finite(argument: str, value: Tensor) -> None:
    """Raise ValueError for NaN or infinity in a tensor whose values are readable."""
    if readable(value) and not torch.isfinite(value).all():
        raise ValueError(f"{argument}: holds NaN or infinity")
