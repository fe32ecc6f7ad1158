"""Area add_upsampled: a bias and an upsampled shortcut added to what BigBiGAN's blocks compute, at their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.baselines import add_upsampled as baselines
from bench.limits import Limit, copies, device_copy
from bench.rows import DTYPES, Candidate, Options, Row, compare, in_both_directions, in_direction
from copgen_fast.ops import add_upsampled
from copgen_fast.ops.backend import resolve


@dataclass(frozen=True)
class Case:
    """A batch of results of `channels` x `side` x `side`, channels_last, and the device types it is measured on."""

    batch: int
    channels: int
    side: int
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"B={self.batch} C={self.channels} {self.side}px"


_BLOCKS = ((1536, 8), (768, 16), (384, 32), (192, 64), (96, 128))
CASES = (
    *(Case(8, *block) for block in _BLOCKS),
    *(Case(256, *block, "fp16", ("cuda",)) for block in _BLOCKS),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device: forward in place, and with the gradients of both images."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    *images, bias, grad = drawn(case, device)
    runs = {"ours": partial(add_upsampled, inplace=direction == "forward"), **baselines.peers(direction)}
    calls = {name: in_direction(direction, partial(run, bias=bias), images, grad) for name, run in runs.items()}
    columns, bound = (resolve("add_upsampled", device), case.precision, direction), limit(*images, direction)
    ours = Candidate("add_upsampled", str(case), *columns, calls.pop("ours"), bound)
    yield from compare([ours], calls, options, device)


def drawn(case: Case, device: torch.device) -> list[Tensor]:
    """x, small, bias and a gradient; the two added are small, so that values stay finite however often they are."""
    seeded = torch.Generator().manual_seed(0)

    def image(side: int, size: float = 1.0) -> Tensor:
        made = size * torch.randn(case.batch, case.channels, side, side, generator=seeded)
        return made.to(device, DTYPES[case.precision], memory_format=torch.channels_last)

    bias = torch.zeros(case.channels, dtype=DTYPES[case.precision], device=device)
    return [image(case.side), image(case.side // 2, 1e-3), bias, image(case.side)]


def limit(x: Tensor, small: Tensor, direction: str) -> Limit:
    """Bytes to move: x and small read, the result written; backward, its gradient read and that of small written."""
    forward = direction == "forward"
    what = "x and small read, the result written" + ("" if forward else "; its gradient read, that of small written")
    parts = [2 * x.numel() + small.numel(), *(() if forward else (x.numel() + small.numel(),))]
    if x.device.type == "cuda":
        return device_copy(what, x.itemsize * sum(parts), x.device)
    source, target = (torch.zeros(parts[0] // 2, dtype=x.dtype) for _ in range(2))
    # A copy reads as much as it writes: halves of what is moved.
    return copies(what, [(target[: part // 2], source[: part // 2]) for part in parts])
