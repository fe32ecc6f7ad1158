"""Argument checks for public functions: which argument, what came, what was expected. Needs torch only."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def expect_tensor(
    argument: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: Collection[torch.dtype] | None = None,
) -> Tensor:
    """Return `value` when it is a tensor of the given shape and one of the given dtypes.

    Args:
        argument: the argument's name, for the message.
        shape: one entry per dimension; an int is an exact size, a str names a free one ("N", "H").
        dtypes: accepted dtypes; None accepts any floating-point dtype.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another number of dimensions, or another size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is None:
        if not value.dtype.is_floating_point:
            raise TypeError(f"{argument}: expected a floating-point tensor, got {value.dtype}")
    elif value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument}: expected {wanted}, got {value.dtype}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{argument}: expected shape [{wanted}], got {list(value.shape)}")
    return value


def expect_finite(argument: str, value: Tensor) -> None:
    """Refuse NaN and infinity on the CPU; a look at another device's values would wait for it.

    Raises:
        ValueError: there are some.
    """
    looks = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not torch.isfinite(value).all():
        raise ValueError(f"{argument}: holds NaN or infinity")
