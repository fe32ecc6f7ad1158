"""Writes shards of pairs. Pair i depends on seed start_seed + i alone; a shard appears only when whole."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copgen_fast import artifacts, interrupts, latents
from copgen_fast.checks import expect_tensor
from copgen_fast.config import PairsConfig, differences
from copgen_fast.errors import UsageError
from copgen_fast.pairs.codecs import CODECS
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

    def render(self, z: Tensor, labels: Tensor | None, name: str, first: int = 0) -> Tensor:
        """Quantised images of latents [n, L] and their `labels`, uint8 [n, 3, H, W] on the CPU.

        Raises:
            NonFiniteError: a NaN or an infinity in the images called `name`; row 0 is called sample `first`.
            TypeError, ValueError: `generator` returned no such tensor.
        """
        inputs = (z,) if labels is None else (z, labels)
        images = self.generator(*(tensor.to(self.device) for tensor in inputs))
        expect_tensor("generator(z)", images, (len(z), 3, "H", "W"))
        return to_uint8(images, name, first).cpu()


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
    written, start = 0, time.perf_counter()
    with torch.no_grad(), ThreadPoolExecutor(config.workers) as pool:
        writer = _ShardWriter(folder, source, config, pool, progress)
        for span in plan(config.count, config.shard_size):
            if span.name in done:
                writer.progress(span.count)
                continue
            done[span.name] = writer.write(span)
            index = dataclasses.replace(index, image_shape=writer.image_shape, shards=_sorted(done))
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
    for name in ("count", "shard_size", "batch", "samples_per_class", "workers"):
        if getattr(config, name) < 1:
            raise UsageError(f"pairs.{name}: expected at least 1, got {getattr(config, name)}")
    if config.start_seed < 0 or config.start_seed + config.count > 2**32:
        raise UsageError(f"pairs.start_seed: {config.count} seeds from {config.start_seed} don't lie in [0, 2**32)")


def _open_index(folder: Path, source: PairSource, config: PairsConfig, identity: dict) -> Index:
    """The folder's index, or an empty one; an index of other pairs is a UsageError."""
    index = Index(identity, config.count, config.shard_size, (3, 0, 0), source.latent_dim, config.codec, ())
    if (folder / "index.json").exists():
        index = read_index(folder)
        sizes = {"count": config.count, "shard_size": config.shard_size, "latent_dim": source.latent_dim}
        require_same(folder, index, identity, **sizes, codec=config.codec)
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


class _ShardWriter:
    """Makes shards, one at a time."""

    def __init__(
        self,
        folder: Path,
        source: PairSource,
        config: PairsConfig,
        pool: ThreadPoolExecutor,
        progress: Progress | None,
    ) -> None:
        self.folder, self.source, self.config, self.pool = folder, source, config, pool
        self.progress = progress or (lambda count: None)
        self.image_shape = (3, 0, 0)

    def write(self, span: Span) -> Shard:
        first_seed = self.config.start_seed + span.first
        # The whole shard's latents at once: they depend on no batch size.
        z, z_positive = self.source.draw(range(first_seed, first_seed + span.count), span.first)
        displacements = (z_positive.double() - z.double()).norm(dim=1).tolist()
        path, latents_path = self.folder / span.name, self.folder / sidecar(span.name)
        with artifacts.atomic(path) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                index = span.first
                for files in self._encoded(span, z, z_positive):
                    for pair in files:
                        self._add(tar, index, pair, displacements[index - span.first])
                        index += 1
                    self.progress(len(files))
            # Before the tar takes its name, so that no tar is ever without its latents.
            artifacts.write_tensors(latents_path, {"z": z, "z_positive": z_positive})
            tar_facts = temporary.stat().st_size, artifacts.sha256(temporary)
        latent_facts = latents_path.stat().st_size, artifacts.sha256(latents_path)
        return Shard(*span, *tar_facts, *latent_facts, sum(displacements) / span.count)

    def _add(self, tar: tarfile.TarFile, index: int, pair: tuple[bytes, bytes], displacement: float) -> None:
        record = {
            "index": index,
            "seed": self.config.start_seed + index,
            "pseudo_class": index // self.config.samples_per_class,
            "displacement": displacement,
        }
        if self.source.label_of is not None:
            record["label"] = self.source.label_of(index)
        for member, data in zip(members(self.config.codec), (*pair, json.dumps(record).encode()), strict=True):
            add_member(tar, f"{key(index)}.{member}", data)

    def _encode_pair(self, anchor: np.ndarray, positive: np.ndarray) -> tuple[bytes, bytes]:
        encode = CODECS[self.config.codec].encode
        return encode(anchor), encode(positive)

    def _encoded(self, span: Span, z: Tensor, z_positive: Tensor) -> Iterator[list[tuple[bytes, bytes]]]:
        """Image files of each batch, in order; a batch is encoded while the next one is generated."""
        pending = None
        for start in range(0, span.count, self.config.batch):
            if interrupts.stop_requested():
                raise interrupts.Interrupted(
                    f"stopped before {span.name} in {self.folder} was whole: the shards before it are kept; "
                    "run the same command to go on"
                )
            part, first = slice(start, start + self.config.batch), span.first + start
            labels = self.source.labels(range(first, first + len(z[part])))
            anchors = self.source.render(z[part], labels, "images of anchors", first)
            positives = self.source.render(z_positive[part], labels, "images of positives", first)
            self.image_shape = tuple(anchors.shape[1:])
            encoded = self.pool.map(self._encode_pair, _pixels(anchors), _pixels(positives))
            if pending is not None:
                yield list(pending)
            pending = encoded
        yield list(pending)


def _pixels(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()
