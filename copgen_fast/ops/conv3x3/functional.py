"""A 3 x 3 convolution with a padding of 1, and the layer of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from copgen_fast.ops import tiles, winograd
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.ops.conv3x3 import reference
from copgen_fast.ops.conv3x3.operator import fused_conv3x3
from copgen_fast.ops.derivatives import backend_for

_DTYPES = (torch.float32, torch.float64)

_LEAST_TILES = 32  # in a batch; of fewer, preparing the weight takes as long as multiplying by it


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """torch.nn.functional.conv2d(x, weight, bias, padding=1) of 3 x 3 taps; differentiable in all three inputs.

    On a CPU, where channels are many, all three passes take a quarter of the multiplications: Winograd's
    F(4 x 4, 3 x 3) (Lavin and Gray 2016) and, for the weight's gradient, its transpose. Rounding errors of float32 are
    about twice a direct convolution's; the bits do not depend on the number of threads. Elsewhere, under autocast and
    in half precision it is PyTorch's convolution. Second and forward-mode derivatives and torch.func's transforms are
    that one's, too.

    Args:
        x: images [N, C, H, W], N >= 0; any other memory format than channels_last is copied to it by the fused backend.
        weight: [O, C, 3, 3] of x's dtype and device.
        bias: [O], or None.
        backend: a name from `backends()`; None takes the faster for these sizes.

    Returns:
        [N, O, H, W] of x's dtype, or of autocast's.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that the given backend does not compute in.
        ValueError: an argument of another shape or device, or an unknown backend.
    """
    expect_tensor("x", x, ("N", "C", "H", "W"))
    expect_tensor("weight", weight, ("O", x.shape[1], 3, 3))
    chosen = backend_for(resolve("conv3x3", x.device, backend), backend, x, weight, bias)
    if backend is None and not _suits(x, weight):
        chosen = "reference"
    if chosen == "reference":
        out = reference.conv3x3(x, weight)
    else:
        expect_tensor("x", x, tuple(x.shape), _DTYPES)
        expect_tensor("weight", weight, tuple(weight.shape), (x.dtype,))
        out = fused_conv3x3(x, weight)
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the tiles are faster, and give the dtype that PyTorch's convolution would."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return False
    n, channels, height, width = x.shape
    many = min(channels, weight.shape[0]) >= winograd.FEWEST and n * winograd.tiles_of(height, width) >= _LEAST_TILES
    return many and winograd.fill(height, width) >= winograd.LEAST_FILL and tiles.built()


def is_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether an nn.Conv2d has a 3 x 3 kernel, stride 1, zero padding of 1, no dilation and no groups."""
    of_size = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    return of_size and conv.groups == 1 and conv.padding_mode == "zeros"


class Conv3x3(nn.Conv2d):
    """`conv3x3` as a module, with the parameters of nn.Conv2d(in_channels, out_channels, 3, padding=1).

    `Conv3x3.of(conv)` shares those of a layer; `backend` is as for `conv3x3`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)
        self.backend = backend

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Conv3x3 | None:
        """A `Conv3x3` that shares the parameters of an nn.Conv2d; None unless `is_conv3x3`."""
        if not is_conv3x3(conv):
            return None
        same = cls(conv.in_channels, conv.out_channels, conv.bias is not None, "meta")  # draws no random numbers
        same.weight, same.bias = conv.weight, conv.bias
        return same.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to [N, O, H, W]."""
        return conv3x3(x, self.weight, self.bias, backend=self.backend)
