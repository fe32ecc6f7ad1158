"""Area cond_norm: a generator's conditional normalisation with its ReLU at the sizes of BigBiGAN's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.baselines import cond_norm as baselines
from bench.limits import Limit, copies, device_copy
from bench.rows import DTYPES, Candidate, Options, Row, compare, in_both_directions, in_direction
from copgen_fast.ops import cond_norm
from copgen_fast.ops.backend import resolve


@dataclass(frozen=True)
class Case:
    """A batch of activations of `channels` x `side` x `side`, and the device types it is measured on."""

    batch: int
    channels: int
    side: int
    precision: str = "fp32"
    layout: str = "NHWC"
    upsample: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        upsampled = " upsampled" if self.upsample else ""
        return f"B={self.batch} C={self.channels} {self.side}px {self.layout}{upsampled}"


# Channels and sides of the tensors that BigBiGAN normalises.
_BLOCKS = ((1536, 4), (1536, 8), (768, 16), (384, 32), (192, 64), (96, 128))
CASES = (
    *(Case(8, channels, side) for channels, side in _BLOCKS),
    Case(8, 96, 128, layout="NCHW"),
    Case(8, 192, 64, upsample=True),
    *(Case(256, channels, side, "fp16", devices=("cuda",)) for channels, side in _BLOCKS),
    Case(256, 192, 64, "fp16", upsample=True, devices=("cuda",)),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device: forward, also in place where possible, and with all three gradients."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    inputs, grad = drawn(case, device)
    ours = {str(case): in_direction(direction, partial(cond_norm, upsample=case.upsample), inputs, grad)}
    if direction == "forward" and not case.upsample:
        # Scales and shifts under which values stay finite, however often they are overwritten.
        mild = [inputs[0].clone(), torch.full_like(inputs[1], 0.5), torch.full_like(inputs[2], 0.1)]
        ours[f"{case} in place"] = lambda: cond_norm(*mild, inplace=True)
    columns, bound = (resolve("cond_norm", device), case.precision, direction), limit(inputs[0], grad, direction)
    candidates = [Candidate("cond_norm", name, *columns, call, bound) for name, call in ours.items()]
    peers = baselines.peers(case.upsample).items()
    calls = {name: in_direction(direction, peer, inputs, grad) for name, peer in peers}
    yield from compare(candidates, calls, options, device)


def drawn(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, scale and shift, and a gradient of the result."""
    seeded = torch.Generator().manual_seed(0)
    layout = torch.channels_last if case.layout == "NHWC" else torch.contiguous_format
    large = 2 * case.side if case.upsample else case.side
    x, grad = (
        torch.randn(case.batch, case.channels, side, side, generator=seeded).to(
            device, DTYPES[case.precision], memory_format=layout
        )
        for side in (case.side, large)
    )
    return [x, *torch.randn(2, case.batch, case.channels, generator=seeded).to(device)], grad


def limit(x: Tensor, grad: Tensor, direction: str) -> Limit:
    """Bytes to move: x read, the result written; backward, its gradient and x read, and x's gradient written."""
    forward = direction == "forward"
    what = "x read, the result written" + ("" if forward else "; its gradient and x read, that of x written")
    if x.device.type == "cuda":
        moved = x.nbytes + grad.nbytes
        return device_copy(what, moved if forward else 2 * moved + x.nbytes, x.device)
    size, large = x.numel(), grad.numel()
    source, target = (torch.zeros(max(size, large), dtype=x.dtype) for _ in range(2))
    # A copy reads as much as it writes: halves of what is moved.
    pairs = [(target[:n], source[:n]) for n in ((size + large) // 2, *(() if forward else (size + large // 2,)))]
    return copies(what, pairs)
