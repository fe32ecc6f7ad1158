"""Area generator: each level of `generators.optimize` beside the published form, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import nn

from bench.harness import Call
from bench.limits import Limit, count_products, matrix_products
from bench.rows import DIRECTIONS, DTYPES, Candidate, Options, Row, chosen, compare, in_direction
from copgen_fast.generators import Level, Rewrites, optimize
from copgen_fast.generators._stylegan2_layers import Shape
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.generators.biggan_deep import BigGANDeep
from copgen_fast.generators.stylegan2 import StyleGAN2
from copgen_fast.runtime import devices
from copgen_fast.runtime.machine import version


@dataclass(frozen=True)
class Case:
    """Batches of `batch` latents at a level of `optimize`, and the device types it is measured on.

    `width` is 96 in the published BigBiGAN, 128 in BigGAN-deep, and of StyleGAN2 the channels of the last block: 64 at
    256 pixels in StyleGAN2-ADA's configuration paper256, 128 in the wider one. `checkpointed` recomputes blocks in the
    backward pass, which trades time for memory.
    """

    batch: int
    level: Level = "exact"
    devices: tuple[str, ...] = ("cpu", "cuda")
    width: int = 96
    resolution: int = 128
    checkpointed: bool = False
    network: Literal["bigbigan", "biggan-deep", "stylegan2"] = "bigbigan"

    def __str__(self) -> str:
        return f"{self.network} B={self.batch} {self.resolution}px {self.level}" + " checkpointed" * self.checkpointed

    @property
    def directions(self) -> tuple[str, ...]:
        """A graph replays sampling only; checkpoints matter in the backward pass only."""
        if self.checkpointed:
            return DIRECTIONS[1:]
        return DIRECTIONS[:1] if self.level == "graph" else DIRECTIONS


CASES = (
    Case(8),
    Case(8, checkpointed=True),
    Case(8, width=128, network="biggan-deep"),
    Case(2, width=128, resolution=256, network="stylegan2"),
    Case(8, "half", ("cuda",)),
    *(Case(256, level, ("cuda",)) for level in ("exact", "half", "graph")),
)


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device and direction, and with `options.ablate` of each rewrite left out."""
    with devices.full_float32():  # as the stages run it, and as the rows and their limit are labelled
        for case, device in chosen(CASES, options):
            if case.network == "biggan-deep" and version("pytorch-pretrained-biggan") is None:
                print(f"left out: {case} (pip install 'copgen_fast[biggan]')", flush=True)
                continue
            published = random_generator(case).to(device)
            for direction in case.directions:
                yield from _rows(case, direction, published, device, options)
        if options.ablate and options.only in f"{CASES[0]}, without":
            yield from _ablation(CASES[0], devices.resolve(options.device, "fp32"), options)


def random_bigbigan(case: Case) -> BigBiGAN:
    """Weights as initialised, scaled so that images are neither flat nor saturated; frozen."""
    torch.manual_seed(0)
    return BigBiGAN(case.width, case.resolution).eval().requires_grad_(False)


def random_generator(case: Case) -> nn.Module:
    """The case's network with random weights, frozen."""
    make = {"bigbigan": random_bigbigan, "biggan-deep": random_biggan, "stylegan2": random_stylegan2}
    return make[case.network](case)


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


def random_stylegan2(case: Case) -> StyleGAN2:
    """A frozen StyleGAN2 with random weights and noise, scaled so that images are neither flat nor saturated."""
    torch.manual_seed(0)
    sides = [2**i for i in range(2, case.resolution.bit_length())]
    channels = tuple(min(512, case.width * case.resolution // side) for side in sides)
    generator = StyleGAN2(Shape(channels, clamp=256.0)).eval().requires_grad_(False)
    for block in generator.synthesis.blocks:
        block.torgb.weight.mul_(0.2)
        for conv in block.convs:
            conv.noise_strength.fill_(0.1)
    return generator


def _rows(case: Case, direction: str, published: nn.Module, device: torch.device, options: Options) -> Iterator[Row]:
    fast = optimize(published, case.level, batch=case.batch, checkpoint=case.checkpointed)
    counted = fast.generator if case.level == "graph" else fast  # a replayed graph shows no products
    bound = limit(case, direction, _call(counted, "forward", case, device), device)
    peers = {"published form, same weights": _call(published, direction, case, device)}
    if case.checkpointed:
        peers["activations kept, same level"] = _call(optimize(published, case.level), direction, case, device)
    precision = "fp32" if case.level == "exact" else "fp16"
    ours = _call(fast, direction, case, device)
    mine = Candidate("generator", str(case), "pytorch", precision, direction, ours, bound)
    yield from compare([mine], peers, options, device)


def _ablation(case: Case, device: torch.device, options: Options) -> Iterator[Row]:
    published = random_bigbigan(case).to(device)

    def call(rewrites: Rewrites) -> Call:
        return _call(optimize(published, rewrites=rewrites), "forward", case, device)

    whole = call(Rewrites())
    bound = limit(case, "forward", whole, device)
    ours = []
    for name in (field.name for field in fields(Rewrites)):
        columns = (f"{case}, without {name}", "pytorch", "fp32", "forward")
        ours.append(Candidate("generator", *columns, call(replace(Rewrites(), **{name: False})), bound))
    yield from compare(ours, {"all rewrites": whole}, options, device)


def _call(generator: nn.Module, direction: str, case: Case, device: torch.device) -> Call:
    """Sampling without gradients, or images and the gradient with respect to z."""
    z = torch.randn(case.batch, generator.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(case.batch, device=device) % generator.classes if generator.classes else None
    gradient = torch.ones(case.batch, *generator.image_shape, device=device)
    return in_direction(direction, lambda z: generator(z, labels), [z], gradient)


def limit(case: Case, direction: str, sampling: Call, device: torch.device) -> Limit:
    """The products of a call of `sampling`, backward as many again, at the rate of a large matrix product."""
    operations = count_products(sampling) * (1 if direction == "forward" else 2)
    dtype = DTYPES["fp32" if case.level == "exact" else "fp16"]
    return matrix_products(f"{operations / case.batch / 1e9:.1f} an image", operations, dtype, device)
