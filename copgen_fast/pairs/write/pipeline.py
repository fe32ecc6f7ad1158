"""Pipeline from seeds to encoded pairs: latents are drawn, images generated, copied and encoded, batch by batch."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from copgen_fast.config import PairsConfig
from copgen_fast.pairs.format import Span
from copgen_fast.pairs.write.encoding import Encoder, Files
from copgen_fast.pairs.write.pinned import PinnedBatch, PinnedBuffers
from copgen_fast.pairs.write.source import PairSource, displacements, each_positive
from copgen_fast.runtime import devices

# One batch is written, one encoded, and one generated (on a GPU: copied) at the same time.
_BUFFERS = 3

T = TypeVar("T")


class ShardLatents(NamedTuple):
    """What a shard holds beside images: latents, float32 on the CPU, z [n, L] and z_positive [n, L] or [n, K, L], and
    KEY.json of each pair.
    """

    z: Tensor
    z_positive: Tensor
    records: list[dict]


class EncodedBatch(NamedTuple):
    """Encoded pairs `first` .. `first + len(files) - 1`, the shape (3, H, W) of images, and their shard's latents."""

    latents: ShardLatents
    first: int
    image_shape: tuple[int, int, int]
    files: Files


def encoded_batches(source: PairSource, config: PairsConfig, spans: Sequence[Span]) -> Iterator[EncodedBatch]:
    """Batches of these shards, in order; a batch is generated while the one before it is encoded, across shards too.

    An error is raised after the batches before it. Close the iterator to end the threads.
    """
    buffers = PinnedBuffers(_BUFFERS, source.device, source.positives)
    with contextlib.closing(Encoder(config.codec, config.workers)) as encoder:
        generated = prefetch(_generate(source, config, spans, buffers), batches_queued(source.device))
        encoding = ((latents, batch, encoder.submit(buffers.pixels(batch))) for latents, batch in generated)
        for latents, batch, files in prefetch(encoding, 1):
            yield EncodedBatch(latents, batch.first, buffers.image_shape, files())
            buffers.free(batch)


def batches_queued(device: torch.device) -> int:
    """How many batches are launched on a device beyond the one that is waited for."""
    return 1 if device.type == "cuda" else 0


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, each yielded once `count` more are made; an exception comes after the items before it."""
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


def _generate(
    source: PairSource, config: PairsConfig, spans: Sequence[Span], buffers: PinnedBuffers
) -> Iterator[tuple[ShardLatents, PinnedBatch]]:
    for span in spans:
        # Latents of the whole shard at once, so that they do not depend on the batch size.
        latents, labels = _draw(source, config, span), source.labels(range(span.first, span.first + span.count))
        z, z_positive = (devices.send(tensor, source.device) for tensor in latents[:2])
        labels = None if labels is None else devices.send(labels, source.device)
        for start in range(0, span.count, config.batch):
            rows = slice(start, start + config.batch)
            classes = None if labels is None else labels[rows]
            made = (source.images(latent[rows], classes) for latent in (z, *each_positive(z_positive)))
            yield latents, buffers.put(*made, first=span.first + start)


def _draw(source: PairSource, config: PairsConfig, span: Span) -> ShardLatents:
    seed = config.start_seed + span.first
    z, z_positive = source.draw(range(seed, seed + span.count), span.first)
    records = []
    for index, displacement in enumerate(displacements(z, z_positive).tolist(), span.first):
        record = {
            "index": index,
            "seed": config.start_seed + index,
            "pseudo_class": index // config.samples_per_class,
            "displacement": displacement,
        }
        if source.label_of is not None:
            record["label"] = source.label_of(index)
        records.append(record)
    return ShardLatents(z, z_positive, records)
