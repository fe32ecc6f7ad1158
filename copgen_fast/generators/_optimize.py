"""Faster forms of a frozen generator: exact rewrite, half precision, CUDA graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from copgen_fast.errors import CopgenError, UsageError, explain, in_one_line
from copgen_fast.generators._choice import by_table, measured
from copgen_fast.generators._interface import copy_attributes, expect_labels
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.runtime.devices import full_float32

Level = Literal["exact", "half", "graph"]

# Largest difference by rounding, relative to a layer's largest value, in float32.
TOLERANCE = 1e-4
# Largest difference by half precision in levels of 256: on average, and exceeded by 0.1 % of the values.
MEAN_GATE, TAIL_GATE = 0.5, 8.0
_LATENTS = 4
# Latents of a timed call, where the batch is not known.
_TIMED = 32


@dataclass(frozen=True)
class Levels:
    """Differences of images in levels of 256: the mean, and shares of 0, 1, 2, ... levels after rounding."""

    mean: float
    tail: float
    """Exceeded by one value in a thousand."""
    shares: tuple[float, ...]

    def __str__(self) -> str:
        shares = ", ".join(f"{level}: {share:.2%}" for level, share in enumerate(self.shares) if share)
        return f"mean {self.mean:.3f} levels, 99.9 % within {self.tail:.2f}; by level {shares}"


def optimize(
    generator: nn.Module,
    level: Level = "exact",
    *,
    rewrites: Rewrites | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: bool = False,
) -> nn.Module:
    """A faster module with the generator's call: latents [N, L] (and labels) to images [N, 3, H, W].

    - exact: its exact rewrite (`rewritten(rewrites)`, algebra on its weights), compared with it on random latents,
      layer by layer; a generator without one is returned as it is.
    - half: the exact form with convolutions in half precision, compared in levels of 256 with float32; images have the
      latents' dtype. The result's `difference` is a `Levels`, its `half_dtype` the dtype of convolutions.
    - graph: the half form as a CUDA graph for batches of `batch` latents without gradients; other calls run eagerly.

    Gradients reach z alone: the result has no parameters. The generator itself is not changed.

    Args:
        rewrites: which rewrites to make; None makes all, with the faster way of convolutions: on a GPU the one that
            was faster there when both were timed, on the CPU the one of few products.
        batch: N of the graph.
        dtype: of half; None takes float16 on a GPU and bfloat16 on the CPU, where it is slow.
        checkpoint: compute each block's activations again in the backward rather than keep them.

    Raises:
        CopgenError: the rewrite is not the same function (the first layer that differs is named), or half
            precision changes images by more than 0.5 levels on average or 8 in a thousandth of the values.
        UsageError: an unknown level, a graph without a GPU or a batch, an operation that half precision lacks.
    """
    if level not in ("exact", "half", "graph"):
        raise UsageError(f"level: expected exact, half or graph, got {level!r}")
    device = _device(generator)
    if level == "graph" and (device.type != "cuda" or batch is None):
        raise UsageError(f"level graph needs a GPU and a batch size; the generator is on {device}, batch is {batch}")
    if not hasattr(generator, "rewritten"):
        return generator if level == "exact" else _half(generator, generator, device, dtype)
    half_dtype = dtype or (torch.float16 if device.type == "cuda" else torch.bfloat16)
    with torch.no_grad(), full_float32():
        if rewrites is None:
            rewrites = _faster(generator, device, torch.float32 if level == "exact" else half_dtype, batch)
        exact = generator.rewritten(rewrites).eval()
        expect_same(generator, exact, *_inputs(generator, device))
    exact.checkpointed = checkpoint
    if level == "exact":
        return exact
    half = _half(generator, exact, device, dtype)
    return half if level == "half" else Graphed(half, batch)


def _faster(published: nn.Module, device: torch.device, dtype: torch.dtype, batch: int | None) -> Rewrites:
    """The rewrites with the faster way of convolutions."""
    if device.type != "cuda":
        return by_table(device, dtype)

    def form(rewrites: Rewrites) -> nn.Module:
        exact = published.rewritten(rewrites).eval()
        if dtype == torch.float32:
            return exact
        return exact.in_precision(dtype) if hasattr(exact, "in_precision") else Cast(exact, dtype)

    weights = sum(x.numel() for x in published.parameters())
    name = f"{type(published).__name__}, {weights} weights, {published.image_shape}"
    try:
        return measured(form, _inputs(published, device, batch or _TIMED), name, dtype)
    except torch.OutOfMemoryError:
        return by_table(device, dtype)


class Graphed(nn.Module):
    """A generator as one CUDA graph for latents [batch, L] without gradients; other calls run eagerly.

    Each replay overwrites the images of the one before: they are copied out.
    """

    def __init__(self, generator: nn.Module, batch: int) -> None:
        super().__init__()
        self.generator, self.batch = generator, batch
        copy_attributes(generator, self)
        self.difference, self.half_dtype = generator.difference, generator.half_dtype
        device = _device(generator)
        self.latents = torch.zeros(batch, generator.latent_dim, device=device)
        self.labels = torch.zeros(batch, dtype=torch.int64, device=device) if self.classes else None
        self.graph, self.images = capture(generator, self.latents, self.labels)

    def __reduce__(self) -> str:
        raise TypeError("a CUDA graph can be neither saved nor copied: save or copy the generator, and optimize again")

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of latents [N, L] (and labels), as the generator's."""
        if (
            z.shape != self.latents.shape
            or z.dtype != self.latents.dtype
            or (z.requires_grad and torch.is_grad_enabled())
        ):
            return self.generator(z, labels)
        self.latents.copy_(z)
        if expect_labels(labels, len(z), self.classes) is not None:
            self.labels.copy_(labels)
        self.graph.replay()
        return self.images.clone()


def capture(generator: nn.Module, latents: Tensor, labels: Tensor | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a call without gradients; returns the graph and the images that each replay overwrites."""
    with torch.cuda.device(latents.device), torch.no_grad():  # a graph holds what the current GPU is given
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their algorithms before the capture
                generator(latents, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # By default CUDA refuses memory and events to all threads meanwhile, also to those that load data.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            images = generator(latents, labels)
    return graph, images


class Cast(nn.Module):
    """A generator in another precision; images have the latents' dtype."""

    def __init__(self, generator: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator).to(dtype, memory_format=torch.channels_last)
        self.dtype = dtype
        copy_attributes(generator, self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of latents [N, L] (and labels), as the generator's."""
        return self.generator(z.to(self.dtype), labels).to(z.dtype)


def expect_same(published: nn.Module, rewritten: nn.Module, z: Tensor, labels: Tensor | None = None) -> None:
    """Raise CopgenError, which names the first step that differs, unless all are equal up to rounding."""
    tolerance = TOLERANCE if z.dtype == torch.float32 else 1e-9
    for (name, ours), (_, theirs) in zip(rewritten.steps(z, labels), published.steps(z, labels), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
        if not error <= tolerance:
            raise CopgenError(
                f"the rewritten {type(published).__name__} differs from the published form by {error:.1e} of the "
                f"largest value after {name}, where {tolerance:.0e} is rounding: take --generator.level published"
            )


def difference(images: Tensor, exact: Tensor) -> Levels:
    """Difference of images [N, 3, H, W] in [-1, 1] from exact ones, in levels of 256."""
    levels = ((images.double() - exact.double()).abs() * 127.5).flatten()
    whole = [((x.double() + 1) * 127.5).round() for x in (images, exact)]
    apart = (whole[0] - whole[1]).abs().flatten().long().clamp_max(255)
    shares = torch.bincount(apart.cpu(), minlength=1).double() / max(1, apart.numel())
    tail = levels.sort().values[-max(1, -(-len(levels) // 1000))]
    return Levels(levels.mean().item(), tail.item(), tuple(shares.tolist()))


def _half(published: nn.Module, exact: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The exact form in half precision, with its `difference` from float32 as an attribute."""
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.bfloat16)
    if device.type == "cpu" and dtype == torch.float16:
        raise UsageError("level half: the CPU has no float16 convolutions; take torch.bfloat16")
    with torch.no_grad(), full_float32():
        z, labels = _inputs(published, device)
        wanted = exact(z, labels)
        half = exact.in_precision(dtype) if hasattr(exact, "in_precision") else Cast(exact, dtype)
        try:
            images = half(z, labels)
        except RuntimeError as error:  # of an operation that no half precision has, a matrix inverse say
            if known := explain(error):
                raise known from error
            name = type(published).__name__
            raise UsageError(f"{name} can't compute in {dtype}, {in_one_line(error)}: take level exact") from error
        half.difference, half.half_dtype = difference(images, wanted), dtype
    if not (half.difference.mean <= MEAN_GATE and half.difference.tail <= TAIL_GATE):
        raise CopgenError(
            f"{dtype} changes the images of {type(published).__name__} too much ({half.difference}; allowed are a mean "
            f"of {MEAN_GATE} levels and {TAIL_GATE} for a value in a thousand): take level exact"
        )
    return half


def _inputs(generator: nn.Module, device: torch.device, count: int = _LATENTS) -> tuple[Tensor, Tensor | None]:
    """Latents and, where there are classes, labels for comparisons."""
    seeded = torch.Generator().manual_seed(0)
    dtype = next((x.dtype for x in generator.parameters() if x.is_floating_point()), torch.float32)
    z = torch.randn(count, generator.latent_dim, generator=seeded)
    if getattr(generator, "prior", None) == "own":  # normal numbers are none of its latents
        z = generator.sample(0, count)
    z = z.to(device, dtype)
    labels = torch.randint(generator.classes, (count,), generator=seeded).to(device) if generator.classes else None
    return z, labels


def _device(generator: nn.Module) -> torch.device:
    tensors = (*generator.parameters(), *generator.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
