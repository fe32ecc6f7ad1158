"""Area info_nce: the fused NT-Xent beside PyTorch, lightly, the published SupConLoss and our own chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.baselines import info_nce as baselines
from bench.baselines.info_nce import Peer
from bench.harness import Call, Row
from bench.limits import Limit, matrix_products
from bench.options import Options
from bench.rows import Subject, compare, in_both_directions
from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import resolve

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEMPERATURE = 0.1
# Largest N at which the 2N x 2N matrices of the peers are asked for: a GPU holds more than 100 GB of them.
_PEERS_UP_TO = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Case:
    """N pairs of embeddings of D dimensions, and the devices where it is measured."""

    n: int
    d: int = 128
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"N={self.n} D={self.d}"


# A CPU would take minutes for one step of 65536 pairs.
CASES = (
    *(Case(n) for n in (224, 1024, 4096, 16384)),
    *(Case(n, precision="fp16", devices=("cuda",)) for n in (224, 1024, 4096, 16384, 65536)),
    *(Case(n, precision="bf16", devices=("cuda",)) for n in (4096, 16384)),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, in both directions."""
    yield from in_both_directions(CASES, _rows, options)


def _rows(case: Case, direction: str, device: torch.device, options: Options) -> Iterator[Row]:
    dtype = _DTYPES[case.precision]
    generator = torch.Generator().manual_seed(0)
    anchors, positives = torch.randn(2, case.n, case.d, generator=generator).to(device, dtype)
    leaves = [x.requires_grad_(direction != "forward") for x in (anchors, positives)]

    def in_direction(loss: Peer) -> Call:
        if direction == "forward":
            return lambda: loss(*leaves)
        return lambda: torch.autograd.grad(loss(*leaves), leaves)

    backend = resolve("info_nce", device, dtype=dtype, dimension=case.d)
    found = {} if backend == "chunked" else baselines.tiled(_TEMPERATURE)
    if case.n <= _PEERS_UP_TO[device.type]:
        found |= baselines.peers(_TEMPERATURE)
    ours = in_direction(lambda a, p: info_nce(a, p, temperature=_TEMPERATURE))
    calls = {name: in_direction(peer) for name, peer in found.items()}
    subject = Subject("info_nce", backend, case.precision, direction)
    yield from compare(subject, {str(case): ours}, calls, limit(case, direction, device), options, device)


def limit(case: Case, direction: str, device: torch.device) -> Limit:
    """The products there are to compute: half the symmetric matrix; backward, that again and the matrix times views."""
    views = 2 * case.n
    half = views**2 * case.d
    what = "half the matrix" if direction == "forward" else "half the matrix twice, the matrix times the views"
    operations = half if direction == "forward" else 4 * half
    return matrix_products(what, operations, _DTYPES[case.precision], device)
