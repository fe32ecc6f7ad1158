"""Pairs drawn while training: what the pairs stage would write, generated on the training device instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.pairs.format import levels, magnitudes, require
from copgen_fast.pairs.read.batch import Batches, PairBatch, Ready, as_batch
from copgen_fast.pairs.read.prefetch import Prefetcher
from copgen_fast.pairs.read.sampler import Sampler
from copgen_fast.pairs.write.pinned import MOST
from copgen_fast.pairs.write.source import PairSource, each_positive
from copgen_fast.runtime import devices
from copgen_fast.runtime.latents import NamedPrior


@dataclass(frozen=True)
class OnlinePairs(Dataset):
    """Map-style dataset of generated pairs: reading pair i runs the generator.

    Attributes:
        count: pairs of an epoch.
        start_seed, samples_per_class: as for the pairs stage: pair i has seed start_seed + i, and, unless the
            generator has classes, the label i // samples_per_class.
        endless: each epoch has `count` new pairs, whose numbers follow those of the epoch before.
    """

    source: PairSource
    count: int
    start_seed: int = 0
    samples_per_class: int = 1300
    endless: bool = False

    def __len__(self) -> int:
        return self.count

    @property
    def positives(self) -> int:
        """Of each anchor."""
        return self.source.positives

    @property
    def classes(self) -> int:
        """Of the generator; 0: it has none."""
        return getattr(self.source.generator, "classes", 0)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        """Anchor and positive, uint8 [3, H, W] (several positives [K, 3, H, W]), and label of a pair."""
        anchors, positives, labels = self.draw([number])
        return anchors[0], positives[..., 0, :, :, :], int(labels[0])

    def draw(self, numbers: Sequence[int]) -> PairBatch:
        """The pairs of these numbers; raises as `latents` and `generate` do."""
        return self.generate(numbers, self.latents(numbers))

    @torch.no_grad()
    def latents(self, numbers: Sequence[int]) -> Tensor:
        """Latents [(1 + K) N, L] of the pairs of these N numbers on the CPU, anchors first.

        Raises:
            NonFiniteError: NaN or infinity; the message names the pair.
            TypeError, ValueError: `source` returned another dtype or shape.
        """
        z, z_positive = self.source.draw([self.start_seed + number for number in numbers], numbers)
        return torch.cat([z, *each_positive(z_positive)])

    @torch.no_grad()
    def generate(self, numbers: Sequence[int], latents: Tensor) -> PairBatch:
        """The pairs of `latents`, by one forward of the generator; images lie on its device, labels on the CPU.

        Raises:
            NonFiniteError, CopgenError: NaN, infinity or another scale than [-1, 1]; the message names the pair.
            TypeError, ValueError: `source` returned another dtype or shape.
        """
        source = self.source
        classes = source.labels(numbers)
        given = None if classes is None else devices.send(classes.repeat(1 + self.positives), source.device)
        images = source.images(devices.send(latents, source.device), given)
        pixels = torch.empty(len(images), *images.shape[2:], 3, dtype=torch.uint8, device=images.device)
        pixels.copy_(levels(images).permute(0, 2, 3, 1))
        largest = magnitudes(images).cpu().view(-1, len(numbers))  # waits for the images
        require("images of anchors", largest[0], numbers, MOST)
        for row in largest[1:]:
            require("images of positives", row, numbers, MOST)
        if classes is None:
            classes = torch.tensor([number // self.samples_per_class for number in numbers])
        return as_batch(pixels.unflatten(0, (-1, len(numbers))).permute(0, 1, 4, 2, 3), classes)


class OnlineBatches(Batches):
    """The batches that `loader.PairBatches` makes of the shards, generated.

    On a GPU the batch after the requested one is generated meanwhile, in a thread, on a separate stream.

    Args:
        device: the generator's, where batches are returned.
        prefetched: whether a GPU generates the next batch meanwhile.
    """

    def __init__(self, pairs: OnlinePairs, sampler: Sampler, device: torch.device, prefetched: bool = True) -> None:
        super().__init__(pairs, sampler, "stop", device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # the generator's weights are on their way on another one
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._prefetcher = Prefetcher(self._plan, int(prefetched and self._stream is not None), sampler.steps)

    def _load(self, step: int) -> tuple[list[int], PairBatch]:
        return self._prefetcher(step).on_current_stream(self.device)

    def _plan(self, step: int) -> Callable[[], Ready]:
        indices, pairs = self.sampler.indices(step), self.dataset
        before = step // self.steps_per_epoch * pairs.count if pairs.endless else 0
        numbers = [before + index for index in indices]
        # A generator's own `sample` seeds torch's global generator, which the step may use beside a thread.
        latents = None if isinstance(pairs.source.sample, NamedPrior) else pairs.latents(numbers)
        return lambda: self._generate(indices, numbers, latents)

    def _generate(self, indices: list[int], numbers: list[int], latents: Tensor | None) -> Ready:
        pairs = self.dataset
        with torch.cuda.stream(self._stream):  # None: no stream
            batch = pairs.generate(numbers, pairs.latents(numbers) if latents is None else latents)
            batch = batch._replace(labels=devices.send(batch.labels, self.device))
            return Ready(indices, batch, self._stream and self._stream.record_event())
