"""What is judged: a frozen encoder, and its features of plain images, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from copgen_fast.errors import NonFiniteError
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime.interrupts import Interrupted, stop_requested

Channels = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Subject:
    """A frozen encoder with the normalisation it was trained under.

    Attributes:
        encoder: normalised images, float32 [N, 3, S, S] on `device` -> features [N, D], before any projection
            head. A module must be in eval mode; raw pixels are judged by a plain flatten.
        mean, std: normalisation of images in [0, 1].
        device: where the encoder computes.

    Raises:
        ValueError: the encoder is a module in training mode, whose statistics would move.
    """

    encoder: Callable[[Tensor], Tensor]
    mean: Channels
    std: Channels
    device: torch.device
    _known: dict[Tensor, Tensor] = field(default_factory=dict, init=False, repr=False)  # tensors hash by identity

    def __post_init__(self) -> None:
        if isinstance(self.encoder, nn.Module) and self.encoder.training:
            raise ValueError("encoder: expected a module in eval mode, got one in training mode")

    def features(self, images: Tensor, batch: int) -> Tensor:
        """Features of plain images; computed when first asked for, then kept for as long as this object lives.

        Args:
            images: uint8 [N, 3, S, S]; kept features belong to this very tensor, not to equal ones.
            batch: images encoded at once.

        Returns:
            float32 [N, D] on the CPU.

        Raises:
            TypeError, ValueError: images of another dtype or shape, or features that are not [N, D].
            NonFiniteError: a NaN or an infinity in the features.
            Interrupted: a stop was requested.
        """
        if images not in self._known:
            expect_tensor("images", images, ("N", 3, "H", "W"), (torch.uint8,))
            self._known[images] = torch.cat([self._encode(part, i) for i, part in enumerate(images.split(batch))])
        return self._known[images]

    @torch.inference_mode()
    def _encode(self, images: Tensor, batch_index: int) -> Tensor:
        if stop_requested():
            raise Interrupted("stopped while encoding images to judge; run the same command to judge them again")
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        features = self.encoder((images.to(self.device).float() / 255 - mean) / std)
        expect_tensor("features", features, (len(images), "D"))
        features = features.float().cpu()
        if not features.isfinite().all():
            raise NonFiniteError(f"features: NaN or infinity in batch {batch_index} of the images to judge")
        return features
