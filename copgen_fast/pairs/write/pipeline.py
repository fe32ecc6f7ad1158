"""From seeds to encoded pairs: draws, generates, copies and encodes, each ahead of the next."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from copgen_fast.config import PairsConfig
from copgen_fast.pairs.format import Span
from copgen_fast.pairs.write.encoding import Encoders, Files
from copgen_fast.pairs.write.pinned import Staged, Staging
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.runtime import devices

# Batches whose pixels are held at once: one encoded and written, and one each made and encoded (or copied) meanwhile.
_SLOTS = 3

T = TypeVar("T")


class Drawn(NamedTuple):
    """What a shard holds beside images: latents, float32 [n, L] on the CPU, and KEY.json of each pair."""

    z: Tensor
    z_positive: Tensor
    records: list[dict]


class Batch(NamedTuple):
    """Encoded pairs `first` .. `first + len(files) - 1`."""

    drawn: Drawn
    first: int
    files: Files


class Pipeline(contextlib.ExitStack):
    """Draws, generates, copies and encodes, each ahead of the next, over the borders of shards too.

    Attributes:
        image_shape: (3, H, W) once there are images.
    """

    def __init__(self, source: PairSource, config: PairsConfig) -> None:
        super().__init__()
        self.source, self.config = source, config
        self.image_shape = (3, 0, 0)
        self._encoders: Encoders | None = None
        self._staging: Staging | None = None

    def encoded(self, spans: Sequence[Span]) -> Iterator[Batch]:
        """Batches of these shards in order; what goes wrong with one is raised after those before it."""
        if spans:
            self._encoders = self.enter_context(contextlib.closing(Encoders(self.config.codec, self.config.workers)))
        encoding = map(self._encode, _ahead(self._generated(spans), _batches_on(self.source.device)))
        for drawn, staged, files in _ahead(encoding, 1):
            yield Batch(drawn, staged.first, files())
            self._staging.free(staged)

    def _generated(self, spans: Sequence[Span]) -> Iterator[tuple[Drawn, Staged]]:
        source = self.source
        for span in spans:
            # The whole shard's latents at once: they depend on no batch size.
            drawn, labels = self._draw(span), source.labels(range(span.first, span.first + span.count))
            z, z_positive = (devices.send(tensor, source.device) for tensor in drawn[:2])
            labels = None if labels is None else devices.send(labels, source.device)
            for start in range(0, span.count, self.config.batch):
                part = slice(start, start + self.config.batch)
                classes = None if labels is None else labels[part]
                anchors, positives = source.images(z[part], classes), source.images(z_positive[part], classes)
                yield drawn, self._stage(anchors, positives, span.first + start)

    def _draw(self, span: Span) -> Drawn:
        seed = self.config.start_seed + span.first
        z, z_positive = self.source.draw(range(seed, seed + span.count), span.first)
        records = []
        for index, displacement in enumerate((z_positive.double() - z.double()).norm(dim=1).tolist(), span.first):
            record = {
                "index": index,
                "seed": self.config.start_seed + index,
                "pseudo_class": index // self.config.samples_per_class,
                "displacement": displacement,
            }
            if self.source.label_of is not None:
                record["label"] = self.source.label_of(index)
            records.append(record)
        return Drawn(z, z_positive, records)

    def _stage(self, anchors: Tensor, positives: Tensor, first: int) -> Staged:
        if self._staging is None:
            self.image_shape = tuple(anchors.shape[1:])
            size, device = self.config.batch, self.source.device
            staging = Staging(_SLOTS, size, self.image_shape, device, self._encoders.memory)
            self._staging = self.enter_context(contextlib.closing(staging))
        return self._staging.put(anchors, positives, first)

    def _encode(self, generated: tuple[Drawn, Staged]) -> tuple[Drawn, Staged, Callable[[], Files]]:
        drawn, staged = generated
        files = self._encoders.submit(self._staging.pixels(staged), self._staging.offset(staged.slot))
        return drawn, staged, files


def _batches_on(device: torch.device) -> int:
    """How many batches a device has before it while the host waits for another."""
    return 1 if device.type == "cuda" else 0


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, each handed out when `count` more are there; an exception comes after the items before it."""
    ready: deque[T] = deque()
    failure: Exception | None = None
    while True:
        while failure is None and len(ready) <= count:
            try:
                ready.append(next(items))
            except Exception as error:  # StopIteration too: then there are no more
                failure = error
        if not ready:
            break
        yield ready.popleft()
    if not isinstance(failure, StopIteration):
        raise failure
