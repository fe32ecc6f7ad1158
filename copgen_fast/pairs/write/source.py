"""Source of pairs: latents from seeds on the CPU, images on the device. Pair i depends on its seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.checks import expect_tensor
from copgen_fast.pairs.format import require_finite
from copgen_fast.runtime import latents
from copgen_fast.runtime.seeds import derive32


@dataclass(frozen=True)
class PairSource:
    """A generator, a way of making positives, and the distribution of latents."""

    generator: Callable[..., Tensor]
    """z float32 [n, L] on `device` (and labels int64 [n]) -> images [n, 3, H, W] in [-1, 1]."""
    positive: Callable[[Tensor, Sequence[int]], Tensor]
    """(z float32 [n, L] on the CPU, its n seeds) -> z_positive, the same shape; each row from its z and seed alone."""
    latent_dim: int
    sample: latents.Sample
    device: torch.device
    label_of: Callable[[int], int] | None = None
    """Class of pair i's images, for a conditional generator."""
    positives: int = 1
    """Of each anchor: K. Those after the first are drawn from other seeds, derived of the anchor's."""
    size: int | None = None
    """Pixels a side of the pairs' images; None: as generated."""

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Classes int64 [n] of pairs, on the CPU; None for a generator without classes."""
        return None if self.label_of is None else torch.tensor([self.label_of(index) for index in indices])

    def draw(self, seeds: Sequence[int], first: int | Sequence[int] = 0) -> tuple[Tensor, Tensor]:
        """z [n, L] and z_positive, [n, L] or of several positives [n, K, L], of some seeds, float32 on the CPU.

        Args:
            first: number of the first sample, or numbers of all, for the message.

        Raises:
            NonFiniteError: a NaN or an infinity.
            TypeError, ValueError: `positive` returned another dtype or shape.
        """
        z = latents.each(self.sample, seeds)
        found = [
            self._positive(z, seeds if number == 0 else _others(seeds, number)) for number in range(self.positives)
        ]
        z_positive = found[0] if self.positives == 1 else torch.stack(found, dim=1)
        require_finite("z", z, first)
        require_finite("z_positive", z_positive, first)
        return z, z_positive

    def _positive(self, z: Tensor, seeds: Sequence[int]) -> Tensor:
        return expect_tensor("positive(z, seeds)", self.positive(z, seeds), tuple(z.shape), [torch.float32]).cpu()

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images of latents [n, L] and their `labels`, floating point [n, 3, H, W] on `device`.

        Raises:
            TypeError, ValueError: `generator` returned another dtype or shape.
        """
        inputs = (z,) if labels is None else (z, labels)
        images = self.generator(*(tensor.to(self.device) for tensor in inputs))
        images = expect_tensor("generator(z)", images, (len(z), 3, "H", "W"))
        if self.size is None or not len(z):
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)


def _others(seeds: Sequence[int], number: int) -> list[int]:
    """Seeds of the positives `number` of anchors."""
    return [derive32("positive", number, seed) for seed in seeds]


def each_positive(z_positive: Tensor) -> tuple[Tensor, ...]:
    """The latents [n, L] of each positive, out of [n, L] or [n, K, L]."""
    return (z_positive,) if z_positive.ndim == 2 else z_positive.unbind(1)


def displacements(z: Tensor, z_positive: Tensor) -> Tensor:
    """L2 norm of z_positive - z of each pair, [n], float64; the mean over its positives."""
    norms = [(one.double() - z.double()).norm(dim=1) for one in each_positive(z_positive)]
    return torch.stack(norms).mean(0)
