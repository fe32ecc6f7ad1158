"""Area convolutions: 3 x 3 convolution, plain or after nearest upsampling, by each method, at BigBiGAN's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import convolutions as baselines
from bench.harness import Call
from bench.limits import count_products, matrix_products
from bench.rows import DTYPES, Candidate, Options, Row, compare, in_both_directions, in_direction
from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.generators._choice import by_table
from copgen_fast.generators._convolutions import Method
from copgen_fast.generators._folding import three_by_three
from copgen_fast.ops import tiles

METHODS = {
    "interpolate, 3 x 3 convolution": convolutions.UPSAMPLED_DIRECT,
    "one transposed 4 x 4 convolution": convolutions.TRANSPOSED,
    "products of differences": convolutions.DIFFERENCES,
    "products of differences, in tiles": convolutions.TILED_DIFFERENCES,
    "four 2 x 2 convolutions, a copy each": baselines.PHASES,
    "one 2 x 2 convolution of four phases, four copies": baselines.SHUFFLED,
    "one 3 x 3 convolution, pixel shuffle": baselines.PIXEL_SHUFFLED,
}
PLAIN = {
    "3 x 3 convolution": convolutions.DIRECT,
    "Winograd, F(2 x 2, 3 x 3)": convolutions.WINOGRAD,
    "Winograd, F(4 x 4, 3 x 3), in tiles": convolutions.LARGE_TILES,
}


@dataclass(frozen=True)
class Case:
    """A batch of `channels` x `side` x `side` that becomes `out` x 2 side x 2 side if `upsampled`, channels_last."""

    batch: int
    channels: int
    out: int
    side: int
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    upsampled: bool = True

    def methods(self, device: torch.device) -> dict[str, Method]:
        """The convolution methods to compare, by name; tiled ones only on a CPU with the C++ extension."""
        known, tiled = METHODS if self.upsampled else PLAIN, device.type == "cpu" and tiles.built()
        return {name: method for name, method in known.items() if tiled or not name.endswith("in tiles")}

    def __str__(self) -> str:
        return (
            f"{'upsampled conv' if self.upsampled else 'conv'} {self.channels}->{self.out} {self.side}px B={self.batch}"
        )


_BLOCKS = ((1536, 1536, 4), (1536, 768, 8), (768, 384, 16), (384, 192, 32), (192, 96, 64))
_SECOND = tuple((out, out, 2 * side) for _, out, side in _BLOCKS)
_HALF = {"precision": "fp16", "devices": ("cuda",)}
CASES = (
    *(Case(8, *block) for block in _BLOCKS),
    *(Case(8, *block, upsampled=False) for block in _SECOND),
    *(Case(256, *block, **_HALF) for block in _BLOCKS),
    *(Case(256, *block, **_HALF, upsampled=False) for block in _SECOND),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device; ours is the method that the table takes there, the others are its peers."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    x, weight, grad = (y.to(device, DTYPES[case.precision]) for y in drawn(case))

    def call(method: Method) -> Call:
        prepared = method.prepare(weight)
        return in_direction(direction, lambda x: method.run(x, prepared, None), [x], grad)

    calls = {name: call(method) for name, method in case.methods(device).items()}
    chosen = three_by_three(case.channels, case.out, case.upsampled, by_table(device, x.dtype))
    name = next(name for name, method in case.methods(device).items() if method is chosen)
    ours = calls.pop(name)
    bound = matrix_products(name, count_products(ours), x.dtype, device)
    mine = Candidate("convolutions", str(case), "pytorch", case.precision, direction, ours, bound)
    yield from compare([mine], calls, options, device)


def drawn(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The image, the 3 x 3 weight and a gradient of the result."""
    seeded = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(case.batch, channels, side, side, generator=seeded).to(memory_format=torch.channels_last)
        for channels, side in ((case.channels, case.side), (case.out, case.side * (1 + case.upsampled)))
    )
    weight = torch.randn(case.out, case.channels, 3, 3, generator=seeded) / (9 * case.channels) ** 0.5
    return x, weight, grad
