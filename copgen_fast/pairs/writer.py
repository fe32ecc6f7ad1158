"""Writes shards of pairs. Pair i depends on seed start_seed + i alone; a shard appears only when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from copgen_fast import artifacts, interrupts, latents
from copgen_fast.checks import expect_tensor
from copgen_fast.config import PairsConfig, differences
from copgen_fast.errors import UsageError
from copgen_fast.pairs.encoding import Encoders, Files
from copgen_fast.pairs.format import (
    Index,
    Shard,
    Span,
    add_member,
    key,
    members,
    plan,
    read_index,
    require_finite,
    sidecar,
    to_uint8,
    write_index,
)
from copgen_fast.pairs.staging import Staged, Staging

# Batches whose pixels are held at once: one encoded and written, and one each made and encoded (or copied) meanwhile.
_SLOTS = 3

T = TypeVar("T")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class PairSource:
    """What makes pairs."""

    generator: Callable[..., Tensor]
    """z float32 [n, L] on `device` (and labels int64 [n]) -> images [n, 3, H, W] in [-1, 1]."""
    positive: Callable[[Tensor, Sequence[int]], Tensor]
    """(z float32 [n, L] on the CPU, its n seeds) -> z_positive, the same shape; each row from its z and seed alone."""
    latent_dim: int
    prior: latents.Prior
    device: torch.device
    label_of: Callable[[int], int] | None = None
    """Class of pair i's images, of a conditional generator."""

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Classes int64 [n] of some pairs, on the CPU; None of a generator without classes."""
        return None if self.label_of is None else torch.tensor([self.label_of(index) for index in indices])

    def draw(self, seeds: Sequence[int], first: int = 0) -> tuple[Tensor, Tensor]:
        """z and z_positive of some seeds, both float32 [n, L] on the CPU.

        Raises:
            NonFiniteError: a NaN or an infinity; row 0 is called sample `first`.
            TypeError, ValueError: `positive` returned no such tensor.
        """
        z = latents.sample_each(self.prior, seeds, self.latent_dim)
        z_positive = expect_tensor("positive(z, seeds)", self.positive(z, seeds), tuple(z.shape), [torch.float32])
        z_positive = z_positive.cpu()
        require_finite("z", z, first)
        require_finite("z_positive", z_positive, first)
        return z, z_positive

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images of latents [n, L] and their `labels`, floating [n, 3, H, W] on `device`.

        Raises:
            TypeError, ValueError: `generator` returned no such tensor.
        """
        inputs = (z,) if labels is None else (z, labels)
        images = self.generator(*(tensor.to(self.device) for tensor in inputs))
        return expect_tensor("generator(z)", images, (len(z), 3, "H", "W"))

    def render(self, z: Tensor, labels: Tensor | None, name: str, first: int = 0) -> Tensor:
        """`images`, quantised: uint8 [n, 3, H, W] on the CPU.

        Raises:
            NonFiniteError: a NaN or an infinity in the images called `name`; row 0 is called sample `first`.
        """
        return to_uint8(self.images(z, labels), name, first).cpu()


def write_pairs(
    folder: Path, source: PairSource, config: PairsConfig, identity: dict, progress: Progress | None = None
) -> dict:
    """Write the shards that `folder` still lacks, and index.json after each.

    Args:
        identity: what makes the pairs (digests, names, seeds), as JSON values.
        progress: called after each batch written and for each shard already there, with the number of pairs in it.

    Returns:
        count (pairs in the folder), written, seconds, images_per_s (both of this call; two images a pair)
        and displacement_mean (L2, over all pairs).

    Raises:
        UsageError: a value of `config` is out of range, or the folder holds pairs of another identity.
        NonFiniteError: a NaN or an infinity; the message names the tensor and the pair.
        Interrupted: a stop was requested; whole shards are kept.
        CopgenError: the disk is full; whole shards are kept.
    """
    _check_config(config)
    index = _open_index(folder, source, config, json.loads(json.dumps(identity)))
    done = {shard.name: shard for shard in index.shards if _is_whole(folder, shard)}
    missing = [span for span in plan(config.count, config.shard_size) if span.name not in done]
    progress = progress or (lambda count: None)
    if done:
        progress(sum(shard.count for shard in done.values()))
    written, start = 0, time.perf_counter()
    with torch.no_grad(), _Pipeline(source, config) as pipeline:
        batches = pipeline.encoded(missing)
        for span in missing:
            done[span.name] = _write_shard(folder, span, batches, config, progress)
            index = dataclasses.replace(index, image_shape=pipeline.image_shape, shards=_sorted(done))
            if index.complete:
                index = dataclasses.replace(index, displacement_mean=_displacement_mean(index))
            write_index(folder, index)
            written += span.count
    seconds = time.perf_counter() - start
    return {
        "count": config.count,
        "written": written,
        "seconds": seconds,
        "images_per_s": 2 * written / seconds,
        "displacement_mean": index.displacement_mean,
    }


def _check_config(config: PairsConfig) -> None:
    for name, least in {"count": 1, "shard_size": 1, "batch": 1, "samples_per_class": 1, "workers": 0}.items():
        if getattr(config, name) < least:
            raise UsageError(f"pairs.{name}: expected at least {least}, got {getattr(config, name)}")
    if config.start_seed < 0 or config.start_seed + config.count > 2**32:
        raise UsageError(f"pairs.start_seed: {config.count} seeds from {config.start_seed} don't lie in [0, 2**32)")


def _open_index(folder: Path, source: PairSource, config: PairsConfig, identity: dict) -> Index:
    """The folder's index, or an empty one; an index of other pairs is a UsageError."""
    index = Index(identity, config.count, config.shard_size, (3, 0, 0), source.latent_dim, config.codec, ())
    if (folder / "index.json").exists():
        index = read_index(folder)
        sizes = {"count": config.count, "shard_size": config.shard_size, "latent_dim": source.latent_dim}
        require_same(folder, index, identity, **sizes, codec=config.codec)
    for leftover in folder.glob(".*.incomplete"):  # of a run that was killed
        leftover.unlink()
    return index


def require_same(folder: Path, index: Index, identity: dict, **fields: int | str) -> None:
    """Compare an index with the identity (plain JSON values) and other fields that are wanted.

    Raises:
        UsageError: they differ; the message says in what.
    """
    there = {**index.identity, **{name: getattr(index, name) for name in fields}}
    if found := differences(there, {**identity, **fields}):
        raise UsageError(f"{folder} holds other pairs: {', '.join(found)}: use another --out, or delete that folder")


def _is_whole(folder: Path, shard: Shard) -> bool:
    files = ((folder / shard.name, shard.bytes), (folder / sidecar(shard.name), shard.sidecar_bytes))
    return all(path.exists() and path.stat().st_size == size for path, size in files)


def _sorted(done: dict[str, Shard]) -> tuple[Shard, ...]:
    return tuple(sorted(done.values(), key=lambda shard: shard.first))


def _displacement_mean(index: Index) -> float:
    return sum(shard.displacement_mean * shard.count for shard in index.shards) / index.count


class _Drawn(NamedTuple):
    """What a shard holds beside images: latents, float32 [n, L] on the CPU, and KEY.json of each pair."""

    z: Tensor
    z_positive: Tensor
    records: list[dict]


class _Batch(NamedTuple):
    """Encoded pairs `first` .. `first + len(files) - 1`."""

    drawn: _Drawn
    first: int
    files: Files


def _write_shard(folder: Path, span: Span, batches: Iterator[_Batch], config: PairsConfig, progress: Progress) -> Shard:
    """Write one shard from the next batches, which are its."""
    path, latents_path = folder / span.name, folder / sidecar(span.name)
    with artifacts.atomic(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(0, span.count, config.batch):
                if interrupts.stop_requested():
                    raise interrupts.Interrupted(
                        f"stopped before {span.name} in {folder} was whole: the shards before it are kept; "
                        "run the same command to go on"
                    )
                batch = next(batches)
                drawn = batch.drawn
                for index, files in enumerate(batch.files, batch.first):
                    record = json.dumps(drawn.records[index - span.first]).encode()
                    for member, data in zip(members(config.codec), (*files, record), strict=True):
                        add_member(tar, f"{key(index)}.{member}", data)
                progress(len(batch.files))
        # Before the tar takes its name, so that no tar is ever without its latents.
        artifacts.write_tensors(latents_path, {"z": drawn.z, "z_positive": drawn.z_positive})
        tar_facts = temporary.stat().st_size, artifacts.sha256(temporary)
    latent_facts = latents_path.stat().st_size, artifacts.sha256(latents_path)
    return Shard(*span, *tar_facts, *latent_facts, sum(record["displacement"] for record in drawn.records) / span.count)


class _Pipeline(contextlib.ExitStack):
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

    def encoded(self, spans: Sequence[Span]) -> Iterator[_Batch]:
        """Batches of these shards in order; what goes wrong with one is raised after those before it."""
        if spans:
            self._encoders = self.enter_context(contextlib.closing(Encoders(self.config.codec, self.config.workers)))
        encoding = map(self._encode, _ahead(self._generated(spans), _batches_on(self.source.device)))
        for drawn, staged, files in _ahead(encoding, 1):
            yield _Batch(drawn, staged.first, files())
            self._staging.free(staged)

    def _generated(self, spans: Sequence[Span]) -> Iterator[tuple[_Drawn, Staged]]:
        source = self.source
        for span in spans:
            # The whole shard's latents at once: they depend on no batch size.
            drawn, labels = self._draw(span), source.labels(range(span.first, span.first + span.count))
            z, z_positive, labels = (_upload(tensor, source.device) for tensor in (*drawn[:2], labels))
            for start in range(0, span.count, self.config.batch):
                part = slice(start, start + self.config.batch)
                classes = None if labels is None else labels[part]
                anchors, positives = source.images(z[part], classes), source.images(z_positive[part], classes)
                yield drawn, self._stage(anchors, positives, span.first + start)

    def _draw(self, span: Span) -> _Drawn:
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
        return _Drawn(z, z_positive, records)

    def _stage(self, anchors: Tensor, positives: Tensor, first: int) -> Staged:
        if self._staging is None:
            self.image_shape = tuple(anchors.shape[1:])
            size, device = self.config.batch, self.source.device
            staging = Staging(_SLOTS, size, self.image_shape, device, self._encoders.memory)
            self._staging = self.enter_context(contextlib.closing(staging))
        return self._staging.put(anchors, positives, first)

    def _encode(self, generated: tuple[_Drawn, Staged]) -> tuple[_Drawn, Staged, Callable[[], Files]]:
        drawn, staged = generated
        files = self._encoders.submit(self._staging.pixels(staged), self._staging.offset(staged.slot))
        return drawn, staged, files


def _batches_on(device: torch.device) -> int:
    """How many batches a device has before it while the host waits for another."""
    return 1 if device.type == "cuda" else 0


def _upload(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor on the device, without waiting for it."""
    if tensor is None or device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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
