"""A frozen encoder and its features of plain images, computed once for all evaluations of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from copgen_fast import augmentations, registry
from copgen_fast.config import RunConfig
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals._inference import inference_form
from copgen_fast.images import sets
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.stream import in_order
from copgen_fast.images.views import Centre, View
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime import devices
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.memory import available_memory

Channels = tuple[float, float, float]


class EvalRun(Protocol):
    """The part of a run that evaluations may read; `stages.Run` has it.

    It may also have `normalization`, the encoder's mean and std of images in [0, 1], where these are not those of the
    policy that it was pretrained with.
    """

    config: RunConfig
    folder: Path
    device: torch.device


class LabelledFeatures(NamedTuple):
    """Features float32 [N, D] on the CPU, and labels int64 [N], -1 where there are none."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """An encoder in eval mode with the normalisation that it was trained under.

    Attributes:
        encoder: normalised images, float32 [N, 3, S, S] on `device` -> features [N, D], before any projection head.
        mean, std: normalisation of images in [0, 1].
        device: where the encoder computes.
        batch: images encoded at once.
        precision: arithmetic of the encoder: of its weights where they have it, else by autocast.
        pairs: folder of the pairs that it was pretrained on, or is to be measured on; None: there are none.
        correct: by the name of a top-1 accuracy, which test images took their class, bool [N]: evaluations fill it.
    """

    encoder: Callable[[Tensor], Tensor]
    mean: Channels
    std: Channels
    device: torch.device
    batch: int
    precision: str = "fp32"
    pairs: Path | None = None
    correct: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _known: dict[tuple[OpenSet, str, View], LabelledFeatures] = field(default_factory=dict, init=False, repr=False)

    def split_features(self, data: OpenSet, split: str, view: View | None = None) -> LabelledFeatures:
        """Features and labels of a split's images, decoded while they are encoded; computed once and then kept.

        Args:
            view: what is taken of each image; None: the centre of `--data.image-size` pixels.

        Raises:
            UsageError: images can't be decoded: none can, or `--data.on-corrupt` is stop. Or the features don't fit
                into memory, which is known after the first batch.
            ValueError, NonFiniteError, Interrupted: as `features`.
        """
        view = view or Centre(data.config.image_size)
        if (data, split, view) not in self._known:
            count, labels, done, found = data.splits[split].count, [], 0, None
            for number, batch in enumerate(data.stream(split, view, in_order(count, self.batch))):
                if len(batch.images):
                    part = self.features(batch.images, f"batch {number} of the {split} images")
                    found = _room(count, part.shape[1], split) if found is None else found
                    found[done : done + len(part)] = part
                    done += len(part)
                    labels.append(batch.labels)
            if found is None:
                raise UsageError(f"{data.where}: no {split} image can be decoded")
            self._known[data, split, view] = LabelledFeatures(found[:done], torch.cat(labels))
        return self._known[data, split, view]

    def forget(self) -> None:
        """Free the features that are kept."""
        self._known.clear()

    def features(self, images: Tensor, name: str = "images") -> Tensor:
        """Features of images, float32 [N, D] on the CPU.

        Args:
            images: uint8 [N, 3, S, S], encoded `batch` at a time.
            name: of the images, for messages.

        Raises:
            TypeError, ValueError: images of another dtype or shape, or features that are not [N, D].
            NonFiniteError: a NaN or an infinity in the features.
            Interrupted: a stop was requested.
        """
        expect_tensor("images", images, ("N", 3, "H", "W"), (torch.uint8,))
        features = torch.cat([self.encode(self.normalize(part)).cpu() for part in images.split(self.batch)])
        if not features.isfinite().all():
            raise NonFiniteError(f"features: NaN or infinity in {name}")
        return features

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> what the encoder takes, float32 on its device."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        images = devices.send(images, self.device)
        normalized = torch.empty(images.shape, device=self.device)
        # A CPU keeps a few in its cache for the four passes.
        at_once = max(1, _VALUES // math.prod(images.shape[1:])) if self.device.type == "cpu" else max(1, len(images))
        for part, into in zip(images.split(at_once), normalized.split(at_once), strict=True):
            into.copy_(part).div_(255).sub_(mean).div_(std)
        return normalized

    @torch.no_grad()
    def encode(self, views: Tensor) -> Tensor:
        """Features float32 [N, D], on the device, of normalised views there.

        Raises:
            TypeError, ValueError: features that are not [N, D].
            Interrupted: a stop was requested.
        """
        if stop_requested():
            raise Interrupted("stopped while encoding images; run the same command to evaluate again")
        with devices.autocast(self.device, self.precision):
            features = self.encoder(views)
        expect_tensor("features", features, (len(views), "D"))
        return features.float()


def _room(count: int, dim: int, split: str) -> Tensor:
    """Memory for the features of a split; UsageError where it isn't there, as for raw pixels of photographs."""
    needed, free = 4 * count * dim / 1e6, available_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UsageError(
            f"features of {count} {split} images of {dim} numbers take {needed / 1e3:.3g} GB and {free / 1e3:.3g} GB "
            "of memory are free: leave `pixels` out of --probe.baselines, or take smaller or fewer images"
        )
    return torch.empty(count, dim)


_VALUES = 2**18  # of images that are normalised at once on a CPU: 1 MB
_frozen: WeakKeyDictionary[Callable, FrozenEncoder] = WeakKeyDictionary()
_images: WeakKeyDictionary[EvalRun, OpenSet] = WeakKeyDictionary()


def freeze(encoder: Callable[[Tensor], Tensor], run: EvalRun, pairs: Path | None = None) -> FrozenEncoder:
    """The encoder on the run's device, in eval mode and without gradients; the same object at every call.

    Args:
        encoder: a module, or a function of normalised images; raw pixels are a plain flatten.
        pairs: folder of those that it was pretrained on, where this is its first call.
    """
    if encoder not in _frozen:
        if isinstance(encoder, nn.Module):
            encoder.to(run.device).eval().requires_grad_(False)
        policy = augmentations.get(run.config.pretrain.augmentation)
        mean, std = getattr(run, "normalization", None) or (policy.mean, policy.std)
        probe = run.config.probe
        fast = inference_form(encoder, devices.resolve_precision(probe.precision, run.device))
        _frozen[encoder] = FrozenEncoder(fast, mean, std, run.device, probe.batch, probe.precision, pairs)
    return _frozen[encoder]


def release(encoder: Callable[[Tensor], Tensor]) -> None:
    """Remove an encoder and its features from the cache, so that their memory is freed.

    The cache has weak keys, but a value can be the encoder itself, which keeps it alive.
    """
    _frozen.pop(encoder, None)


def real_images(run: EvalRun) -> OpenSet:
    """The run's real images (`--data`), opened once; nothing is decoded here.

    Raises:
        UsageError: see `images.sets.open_set`, or labels that are not 0 .. C - 1, where an evaluation needs them.
    """
    if run not in _images:
        labelled = any(map(needs_labels, run.config.probe.evals))
        _images[run] = sets.open_set(run.config.data, labelled=labelled)
    return _images[run]


def count_classes(data: OpenSet) -> int:
    """Number of classes; where only reading the training images tells their labels, they are read."""
    labels = data.splits["train"].labels
    if labels is None:
        labels = torch.cat([batch.labels for batch in data.stream("train", Centre(1))])
    return int(labels.max()) + 1


def split_digest(run: EvalRun) -> str | None:
    """SHA-256 (hex) of the lists of the real images, where their split is drawn here."""
    return _images[run].digest if run in _images else None


def left_out(run: EvalRun) -> int:
    """How many images could not be decoded so far."""
    return len(_images[run].faults) if run in _images else 0


def needs_labels(name: str) -> bool:
    """Whether an evaluation compares classes of `--data`: yes, unless it says otherwise or reads other images."""
    return getattr(registry.load("evals", name), "NEEDS_LABELS", not has_own_data(name))


def has_own_data(name: str) -> bool:
    """Whether an evaluation reads other images than those of `--data`."""
    return hasattr(registry.load("evals", name), "check_data")
