"""A frozen encoder and its features of plain images, computed once for all evaluations of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from copgen_fast import augmentations, registry
from copgen_fast.config import RunConfig
from copgen_fast.errors import NonFiniteError
from copgen_fast.images import sets
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime.interrupts import Interrupted, stop_requested

Channels = tuple[float, float, float]


class EvalRun(Protocol):
    """The part of a run that evaluations may read; `stages.Run` has it."""

    config: RunConfig
    folder: Path
    device: torch.device


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """An encoder in eval mode with the normalisation that it was trained under.

    Attributes:
        encoder: normalised images, float32 [N, 3, S, S] on `device` -> features [N, D], before any projection head.
        mean, std: normalisation of images in [0, 1].
        device: where the encoder computes.
        batch: images encoded at once.
    """

    encoder: Callable[[Tensor], Tensor]
    mean: Channels
    std: Channels
    device: torch.device
    batch: int
    _known: dict[Tensor, Tensor] = field(default_factory=dict, init=False, repr=False)  # tensors hash by identity

    def features(self, images: Tensor) -> Tensor:
        """Features of plain images, computed at the first call and then kept.

        Args:
            images: uint8 [N, 3, S, S]; kept features belong to this very tensor, not to equal ones.

        Returns:
            float32 [N, D] on the CPU.

        Raises:
            TypeError, ValueError: images of another dtype or shape, or features that are not [N, D].
            NonFiniteError: a NaN or an infinity in the features.
            Interrupted: a stop was requested.
        """
        if images not in self._known:
            expect_tensor("images", images, ("N", 3, "H", "W"), (torch.uint8,))
            self._known[images] = torch.cat([self._encode(part, i) for i, part in enumerate(images.split(self.batch))])
        return self._known[images]

    @torch.inference_mode()
    def _encode(self, images: Tensor, batch_index: int) -> Tensor:
        if stop_requested():
            raise Interrupted("stopped while encoding images; run the same command to evaluate again")
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        features = self.encoder((images.to(self.device).float() / 255 - mean) / std)
        expect_tensor("features", features, (len(images), "D"))
        features = features.float().cpu()
        if not features.isfinite().all():
            raise NonFiniteError(f"features: NaN or infinity in batch {batch_index} of the images")
        return features


_frozen: WeakKeyDictionary[Callable, FrozenEncoder] = WeakKeyDictionary()
_images: WeakKeyDictionary[EvalRun, sets.LabelledImages] = WeakKeyDictionary()


def freeze(encoder: Callable[[Tensor], Tensor], run: EvalRun) -> FrozenEncoder:
    """The encoder on the run's device, in eval mode and without gradients; the same object at every call.

    Args:
        encoder: a module, or a function of normalised images; raw pixels are a plain flatten.
    """
    if encoder not in _frozen:
        if isinstance(encoder, nn.Module):
            encoder.to(run.device).eval().requires_grad_(False)
        policy = augmentations.get(run.config.pretrain.augmentation)
        _frozen[encoder] = FrozenEncoder(encoder, policy.mean, policy.std, run.device, run.config.probe.batch)
    return _frozen[encoder]


def labelled_images(run: EvalRun) -> sets.LabelledImages:
    """The run's real images (`--data`), read once; without labels (-1) where none of its evaluations needs any.

    Raises:
        UsageError: see `images.sets.load`.
    """
    if run not in _images:
        _images[run] = sets.load(run.config.data, any(map(needs_labels, run.config.probe.evals)))
    return _images[run]


def left_out(run: EvalRun) -> int:
    """How many of the images that were read could not be decoded."""
    return _images[run].left_out if run in _images else 0


def needs_labels(name: str) -> bool:
    """Whether an evaluation compares classes: yes, unless it says otherwise."""
    return getattr(registry.load("evals", name), "NEEDS_LABELS", True)
