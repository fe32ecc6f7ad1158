"""The first-run check of a generator: what it is found to do, and refusal of what no stage can use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.generators._interface import failed, values_fault

SAME = 1e-3
"""Largest difference of an image from itself in another batch, beyond which its row depends on others."""
_LATENTS = 4


@dataclass(frozen=True)
class Findings:
    """What `examine` found; str() gives it in two lines.

    Attributes:
        latents, images: sizes of one, as text.
        low, high: extremes of the images' values.
        differentiable: whether a gradient reaches z.
        seconds: per image, of the fastest of a few batches.
    """

    latents: str
    images: str
    low: float
    high: float
    prior: str
    classes: int
    differentiable: bool
    seconds: float

    def __str__(self) -> str:
        classes = f" of {self.classes} classes" if self.classes else ""
        gradient = "a" if self.differentiable else "NO"
        return (
            f"latents {self.latents} ({self.prior}) -> images {self.images}{classes}, values {self.low:.2f} to "
            f"{self.high:.2f}\nrepeatable, each image from its own latent alone, {gradient} gradient reaches z; "
            f"{1e3 * self.seconds:.3g} ms an image"
        )


def examine(generator: nn.Module, device: torch.device) -> Findings:
    """Check a generator on its device, by a few batches of four latents.

    Raises:
        UsageError: the same seed gives other latents, the same latents give other images, an image depends on the
            rest of its batch or not on its latent, or its values are no image's; the message names the layer, where
            layers are Python's. Or its forward fails.
    """
    z = generator.sample(0, _LATENTS)
    if not torch.equal(z, generator.sample(0, _LATENTS)):
        raise UsageError("sample(0, 4) gives other latents at each call: draw them by torch or a seeded generator")
    z = z.to(device)
    labels = torch.arange(_LATENTS, device=device) % generator.classes if generator.classes else None
    try:
        with torch.random.fork_rng(devices=[]):
            return _examine(generator, z, labels)
    except CopgenError:
        raise
    except Exception as error:
        raise failed(error, generator, z, labels, ": two went well, and it must take any number") from error


def _examine(generator: nn.Module, z: Tensor, labels: Tensor | None) -> Findings:
    device = z.device
    others = generator.sample(1, _LATENTS).to(device)
    others[0] = z[0]
    with torch.no_grad():
        draw = lambda latents: generator(latents, labels)  # noqa: E731 (labels stay as they are)
        images, elsewhere = draw(z), draw(others)
        if fault := values_fault(torch.cat([images, elsewhere])):
            raise UsageError(f"images of latents {list(z.shape)}: {fault}")
        state = _random_state(device)
        took: list[float] = []
        while not took or len(took) < 5 and sum(took) < 0.2:
            start = time.perf_counter()
            again = draw(z)
            low, high = again.min().item(), again.max().item()  # waits for a GPU
            took.append(time.perf_counter() - start)
        # What draws no random numbers may round otherwise, on a GPU.
        most = SAME if torch.equal(state, _random_state(device)) else 0.0
        if (difference := _largest(images, again)) > most:
            where = _first_difference(generator, lambda: draw(z), lambda: draw(z), _LATENTS, most)
            raise UsageError(
                f"the same latents give images that differ by {difference:.2g}{where}: draw its noise once, in "
                "__init__, or make it part of z"
            )
        if not torch.equal(z[1:], others[1:]) and torch.equal(images[1:], elsewhere[1:]):
            raise UsageError("other latents give the same images: its forward must depend on z")
        if (difference := _largest(images[:1], elsewhere[:1])) > SAME:
            where = _first_difference(generator, lambda: draw(z), lambda: draw(others), 1, SAME)
            raise UsageError(
                f"an image differs by {difference:.2g} in another batch{where}: each must depend on its own latent "
                "alone (batch norm: in eval mode, with running statistics)"
            )
    tried = " found by trying" if getattr(generator, "found_by_trying", False) else ""
    return Findings(
        latents=" x ".join(map(str, generator.latent_shape)) + tried,
        images=" x ".join(map(str, generator.image_shape)),
        low=low,
        high=high,
        prior=generator.prior,
        classes=generator.classes,
        differentiable=differentiable(generator, z[:2], None if labels is None else labels[:2]),
        seconds=min(took) / _LATENTS,
    )


def differentiable(generator: nn.Module, z: Tensor, labels: Tensor | None) -> bool:
    """Whether a finite gradient that isn't zero reaches these latents."""
    z = z.clone().requires_grad_()
    try:
        with torch.enable_grad():
            images = generator(z, labels)
            (gradient,) = torch.autograd.grad(images.float().square().sum(), z)
    except RuntimeError:  # no graph, or an operation without a derivative
        return False
    return bool(gradient.isfinite().all() and gradient.ne(0).any())


def _random_state(device: torch.device) -> Tensor:
    """State of the global random generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _first_difference(
    module: nn.Module, one: Callable[[], Tensor], other: Callable[[], Tensor], rows: int, most: float
) -> str:
    """Words that name the first layer whose output differs by over `most` in the first rows of two calls, if any."""
    names = {layer: name for name, layer in module.named_modules() if not any(layer.children())}
    seen: list[list[tuple[str, Tensor]]] = []
    for call in (one, other):
        outputs: list[tuple[str, Tensor]] = []

        def keep(layer: nn.Module, _: object, output: object, outputs: list = outputs) -> None:
            if isinstance(output, Tensor):
                outputs.append((f"{names[layer]} ({type(layer).__name__})", output[:rows].detach()))

        hooks = []
        try:
            hooks = [layer.register_forward_hook(keep) for layer in names]
            call()
        except RuntimeError:  # layers of a script take no hooks
            return ""
        finally:
            for hook in hooks:
                hook.remove()
        seen.append(outputs)
    for (name, first), (_, second) in zip(*seen, strict=False):
        if first.shape == second.shape and _largest(first.float(), second.float()) > most:
            return f", from layer {name.removeprefix('generator.')} on"
    return ""
