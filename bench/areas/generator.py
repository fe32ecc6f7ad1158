"""Area generator: each level of `generators.optimize` beside the published form, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import nn

from bench.harness import Call, Row
from bench.limits import Limit, count_products, matrix_products
from bench.machine import version
from bench.options import Options
from bench.rows import Subject, compare
from copgen_fast.generators import Level, Rewrites, optimize
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.generators.biggan_deep import BigGANDeep
from copgen_fast.runtime import devices


@dataclass(frozen=True)
class Case:
    """Batches of `batch` latents at a level, and the devices where it is measured.

    `width` 96 is BigBiGAN's published one; BigGAN-deep has its own, 128, and 128 pixels.
    `checkpointed` computes blocks again in the backward, which is what it measures: time for memory.
    """

    batch: int
    level: Level = "exact"
    devices: tuple[str, ...] = ("cpu", "cuda")
    width: int = 96
    resolution: int = 128
    checkpointed: bool = False
    network: Literal["bigbigan", "biggan-deep"] = "bigbigan"

    def __str__(self) -> str:
        return f"{self.network} B={self.batch} {self.resolution}px {self.level}" + " checkpointed" * self.checkpointed

    @property
    def directions(self) -> tuple[str, ...]:
        """A graph is of sampling alone, checkpoints are for the backward."""
        if self.checkpointed:
            return ("forward+backward",)
        return ("forward",) if self.level == "graph" else ("forward", "forward+backward")


CASES = (
    Case(8),
    Case(8, checkpointed=True),
    Case(8, width=128, network="biggan-deep"),
    Case(8, "half", ("cuda",)),
    *(Case(256, level, ("cuda",)) for level in ("exact", "half", "graph")),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, in both directions; of each trick left out where it is asked for."""
    device = devices.resolve(options.device, "fp32")
    for case in CASES:
        if device.type in case.devices and options.only in str(case):
            if case.network == "biggan-deep" and version("pytorch-pretrained-biggan") is None:
                print(f"left out: {case} (pip install 'copgen_fast[biggan]')", flush=True)
                continue
            published = random_generator(case).to(device)
            with devices.full_float32():  # as the stages run it, and as the rows and their limit are labelled
                for direction in case.directions:
                    yield from _rows(case, direction, published, options)
    if options.ablate and options.only in f"{CASES[0]}, without":
        with devices.full_float32():
            yield from _ablation(CASES[0], random_bigbigan(CASES[0]).to(device), options)


def random_bigbigan(case: Case) -> BigBiGAN:
    """Weights as initialised, scaled so that images are neither flat nor saturated; frozen."""
    torch.manual_seed(0)
    return BigBiGAN(case.width, case.resolution).eval().requires_grad_(False)


def random_generator(case: Case) -> nn.Module:
    """The case's network with random weights, frozen."""
    return random_bigbigan(case) if case.network == "bigbigan" else random_biggan(case)


def random_biggan(case: Case) -> BigGANDeep:
    """The package's network as initialised, its spectral norms those of the weights; frozen."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    torch.manual_seed(0)
    network = BigGAN(BigGANConfig(channel_width=case.width)).requires_grad_(False)
    network.generator.bn.weight.fill_(1)
    network.generator.bn.bias.zero_()
    for _ in range(3):  # in training each forward is a step of the power iteration
        network(torch.randn(1, 128), torch.eye(1, 1000), 1.0)
    return BigGANDeep(network).eval()


def _rows(case: Case, direction: str, published: nn.Module, options: Options) -> Iterator[Row]:
    device = next(published.parameters()).device
    fast = optimize(published, case.level, batch=case.batch, checkpoint=case.checkpointed)
    ours = _in_direction(fast, direction, case)
    counted = fast.generator if case.level == "graph" else fast  # of what is replayed no product is counted
    bound = limit(case, direction, _in_direction(counted, "forward", case), device)
    others = {"published form, same weights": published}
    if case.checkpointed:
        others["activations kept, same level"] = optimize(published, case.level)
    peers = {name: _in_direction(other, direction, case) for name, other in others.items()}
    yield from compare(_subject(case, direction), {str(case): ours}, peers, bound, options, device)


def _ablation(case: Case, published: BigBiGAN, options: Options) -> Iterator[Row]:
    device = published.linear.weight.device
    left_out = {
        f"{case}, without {field.name}": replace(Rewrites(), **{field.name: False}) for field in fields(Rewrites)
    }
    calls = {
        name: _in_direction(optimize(published, rewrites=rewrites), "forward", case)
        for name, rewrites in left_out.items()
    }
    whole = _in_direction(optimize(published), "forward", case)
    subject, bound = _subject(case, "forward"), limit(case, "forward", whole, device)
    yield from compare(subject, calls, {"all rewrites": whole}, bound, options, device)


def _subject(case: Case, direction: str) -> Subject:
    return Subject("generator", "pytorch", "fp32" if case.level == "exact" else "fp16", direction)


def _in_direction(generator: nn.Module, direction: str, case: Case) -> Call:
    """Sampling without gradients, or images and the gradient with respect to z."""
    parameters = (*generator.parameters(), *generator.buffers())
    device = parameters[0].device
    z = torch.randn(case.batch, generator.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(case.batch, device=device) % generator.classes if generator.classes else None
    if direction == "forward":
        return torch.no_grad()(lambda: generator(z, labels))
    leaf = z.requires_grad_()
    gradient = torch.ones(case.batch, *generator.image_shape, device=device)
    return lambda: torch.autograd.grad(generator(leaf, labels), leaf, gradient)


def limit(case: Case, direction: str, sampling: Call, device: torch.device) -> Limit:
    """The products of a call of `sampling`, backward as many again, at the rate of a large matrix product."""
    operations = count_products(sampling) * (1 if direction == "forward" else 2)
    dtype = torch.float32 if case.level == "exact" else torch.float16
    return matrix_products(f"{operations / case.batch / 1e9:.1f} an image", operations, dtype, device)
