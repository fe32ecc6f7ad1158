"""Area conv3x3: a ResNet-18's 3 x 3 convolutions at 128 px, forward and with both gradients, beside PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import conv3x3 as baselines
from bench.limits import Limit, matrix_products
from bench.rows import Candidate, Options, Row, compare, in_both_directions, in_direction
from copgen_fast.ops import conv3x3
from copgen_fast.ops.backend import resolve


@dataclass(frozen=True)
class Case:
    """A convolution of `batch` channels_last images [`channels`, `side`, `side`] to as many output channels."""

    batch: int
    channels: int
    side: int
    devices: tuple[str, ...] = ("cpu",)

    def __str__(self) -> str:
        return f"B={self.batch} C={self.channels} {self.side}px"


CASES = tuple(Case(64, *stage) for stage in ((64, 32), (128, 16), (256, 8), (512, 4)))


def rows(options: Options) -> Iterator[Row]:
    """Benchmark rows of every case: the forward pass, and that with the gradients of images and weight."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    *inputs, grad = drawn(case)
    columns, bound = (resolve("conv3x3", device), "fp32", direction), limit(case, direction, device)
    ours = Candidate("conv3x3", str(case), *columns, in_direction(direction, conv3x3, inputs, grad), bound)
    calls = {name: in_direction(direction, peer, inputs, grad) for name, peer in baselines.peers().items()}
    yield from compare([ours], calls, options, device)


def drawn(case: Case) -> list[Tensor]:
    """Random images, weight and gradient of the output, all in channels_last memory format, as in an encoder."""
    seeded, size = torch.Generator().manual_seed(0), (case.batch, case.channels, case.side, case.side)
    sizes = size, (case.channels, case.channels, 3, 3), size
    return [torch.randn(each, generator=seeded).to(memory_format=torch.channels_last) for each in sizes]


def limit(case: Case, direction: str, device: torch.device) -> Limit:
    """Lower bound of the time: 36 multiply-adds for each 4 x 4 tile and pair of channels, in every pass."""
    tiles, passes = case.batch * (-(-case.side // 4)) ** 2, 1 if direction == "forward" else 3
    operations = 2 * 36 * tiles * case.channels**2 * passes
    return matrix_products(f"36 products a tile, {passes} passes", operations, torch.float32, device)
