"""Area rand_augment: InfoMin's RandAugment of a batch beside torchvision's, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.baselines import rand_augment as baselines
from bench.limits import copies, device_copy
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast.ops import RandAugmentParams, RandAugmentPolicy, backends, rand_augment

_PAIRS = 9


@dataclass(frozen=True)
class Case:
    """A batch of `batch` square images, by InfoMin's policy drawn beforehand; device types it is measured on."""

    batch: int
    side: int
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"infomin B={self.batch} {self.side}px"


CASES = (Case(64, 128), Case(512, 32), Case(352, 128, devices=("cuda",)))


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, forward: torchvision's 8-bit operations have no gradient."""
    for case, device in chosen(CASES, options):
        yield from _rows(case, device, options)


def _rows(case: Case, device: torch.device, options: Options) -> Iterator[Row]:
    generator, policy = torch.Generator().manual_seed(0), RandAugmentPolicy()
    coarse = torch.rand(case.batch, 3, 16, 16, generator=generator)
    images = F.interpolate(coarse, case.side, mode="bicubic").clamp(0, 1)
    uniform = torch.rand(case.batch, 5 * policy.steps, generator=generator, dtype=torch.float64)
    params = RandAugmentParams.from_uniform(uniform, policy)
    here, there = images.to(device), params.map(lambda tensor: tensor.to(device))
    if device.type == "cuda":
        bound = device_copy("images read, views written", 2 * here.nbytes, device)
    else:
        bound = copies("the images once", [(torch.empty_like(here), here)])
    columns = (backends()["rand_augment"][device.type], "fp32", "forward")
    always = RandAugmentPolicy(probability=1.0)  # as torchvision's transform applies what it draws

    def drawn() -> torch.Tensor:
        numbers = torch.rand(case.batch, 5 * always.steps, device=device, dtype=torch.float64)
        return rand_augment(here, RandAugmentParams.from_uniform(numbers, always))

    for name, call, peers in (
        (str(case), partial(rand_augment, here, there), baselines.peers(params)),
        (f"{case}, all drawn and applied", drawn, baselines.drawing_peers(policy.steps)),
    ):
        ours = Candidate("rand_augment", name, *columns, call, bound)
        calls = {peer: partial(run, images) for peer, run in peers.items()}
        yield from compare([ours], calls, options, device, least=_PAIRS)
