"""Area info_nce: the fused NT-Xent beside PyTorch, lightly, the published SupConLoss and the chunked backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.baselines import info_nce as baselines
from bench.harness import captured
from bench.limits import Limit, matrix_products
from bench.rows import DTYPES, Candidate, Options, Row, compare, in_both_directions, in_direction
from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.info_nce.small_batch import MOST_ROWS

_TEMPERATURE = 0.1
# Largest N at which the peers run, which hold 2N x 2N matrices: more than 100 GB of a GPU at the next one.
PEERS_UP_TO = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Case:
    """N pairs of embeddings of D dimensions, and the device types it is measured on.

    `graph`: as a CUDA graph, beside the same call launched by the host.
    """

    n: int
    d: int = 128
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    graph: bool = False

    def __str__(self) -> str:
        return f"N={self.n} D={self.d}{', CUDA graph' if self.graph else ''}"


# A CPU would take minutes for one step of 65536 pairs.
CASES = (
    *(Case(n) for n in (224, 1024, 4096, 16384)),
    *(Case(n, precision="fp16", devices=("cuda",)) for n in (224, 1024, 4096, 16384, 65536)),
    *(Case(n, precision="bf16", devices=("cuda",)) for n in (4096, 16384)),
    *(Case(n, precision="fp16", devices=("cuda",), graph=True) for n in (224, 16384)),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, in both directions."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    dtype, generator = DTYPES[case.precision], torch.Generator().manual_seed(0)
    inputs = torch.randn(2, case.n, case.d, generator=generator).to(device, dtype).unbind()
    backend = resolve("info_nce", device, dtype=dtype, dimension=case.d)
    peers = {} if backend == "chunked" else baselines.tiled(_TEMPERATURE)
    if case.n <= PEERS_UP_TO[device.type]:
        peers |= baselines.peers(_TEMPERATURE)
    ours = in_direction(direction, partial(info_nce, temperature=_TEMPERATURE), inputs)
    calls = {name: in_direction(direction, peer, inputs) for name, peer in peers.items()}
    if case.graph:
        ours, calls = captured(ours), {"same call, launched by the host": ours}
    bound = limit(case, direction, device)
    mine = Candidate("info_nce", str(case), backend, case.precision, direction, ours, bound, case.graph)
    yield from compare([mine], calls, options, device)


def limit(case: Case, direction: str, device: torch.device) -> Limit:
    """The fewest products: half the symmetric matrix; backward, that half again where it is not kept, and the matrix
    times the views.
    """
    views = 2 * case.n
    half = views**2 * case.d
    kept = device.type == "cpu" and views <= MOST_ROWS
    what, halves = "half the matrix", 1
    if direction != "forward":
        what, halves = f"{what}{'' if kept else ' twice'}, the matrix times the views", 3 if kept else 4
    return matrix_products(what, halves * half, DTYPES[case.precision], device)
