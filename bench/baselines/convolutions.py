"""Peers of a 3 x 3 convolution after nearest upsampling by 2: convolutions by phase of the large image.

Each of its four phases (rows 2i + p, columns 2j + q) is a 2 x 2 convolution of the small image, as the taps that fall
on one of its pixels add up: 4 products an output pixel and pair of channels, as in one transposed convolution.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.generators._convolutions import Method

# Which of three taps of phases 0 and 1 fall on the first and on the second of two neighbours.
_OF_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


def _for_phases(weight: Tensor) -> Tensor:
    """The weights of all phases, [4 out, in, 2, 2]."""
    taps = weight.new_tensor(_OF_TAPS)
    return torch.einsum("pak,qbl,oikl->pqoiab", taps, taps, weight).flatten(0, 2).contiguous()


def _into_phases(x: Tensor, out: int, phases: Iterable[Tensor]) -> Tensor:
    """[N, out, 2H, 2W] in the layout of the small image x [N, in, H, W]; each phase is copied as it comes."""
    n, _, height, width = x.shape
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    shape = (n, out, 2 * height, 2 * width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    for k, phase in enumerate(phases):
        y[:, :, k // 2 :: 2, k % 2 :: 2] = phase
    return y


def _phases(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Four convolutions, each written to its phase."""
    padded, (height, width) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    parts = (
        F.conv2d(padded[:, :, k // 2 : k // 2 + height + 1, k % 2 : k % 2 + width + 1], taps, bias)
        for k, taps in enumerate(weight.chunk(4))
    )
    return _into_phases(x, len(weight) // 4, parts)


def _shuffled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One convolution of four times the channels, over one row and column more than a phase needs."""
    together = F.conv2d(x, weight, None if bias is None else bias.repeat(4), padding=1)
    height, width = x.shape[2:]
    parts = (part[:, :, k // 2 : k // 2 + height, k % 2 : k % 2 + width] for k, part in enumerate(together.chunk(4, 1)))
    return _into_phases(x, len(weight) // 4, parts)


def _for_pixel_shuffle(weight: Tensor) -> Tensor:
    """[4 out, in, 3, 3], a channel's phases side by side, with zeros where a phase has no tap."""
    phases = _for_phases(weight).unflatten(0, (4, -1))
    padded = [F.pad(phases[k], (k % 2, 1 - k % 2, k // 2, 1 - k // 2)) for k in range(4)]
    return torch.stack(padded, 1).flatten(0, 1).contiguous()


def _pixel_shuffled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.repeat_interleave(4)
    return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2)


PHASES = Method(_for_phases, _phases)
SHUFFLED = Method(_for_phases, _shuffled)
PIXEL_SHUFFLED = Method(_for_pixel_shuffle, _pixel_shuffled)
