"""Verification of shards: digests of all files, and a sample of pairs made again from their seeds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from copgen_fast.errors import CorruptArtifactError
from copgen_fast.files import read_bytes
from copgen_fast.images.codecs import CODECS, REMEDY
from copgen_fast.pairs.format import Shard, check_shards, key, read_complete_index, sidecar, to_uint8, unlisted_shards
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.shares import require_same
from copgen_fast.pairs.write.source import PairSource, displacements, each_positive
from copgen_fast.runtime import artifacts, seeds

# Half precision may change all but a thousandth of an image's values by 8 levels, which generators check as they load,
# and rounding to whole levels adds one.
_HALF_TOLERANCE = 8 + 1
_BATCH = 64


def verify_pairs(folder: Path, source: PairSource, identity: dict, samples: int = 16, seed: int = 0) -> dict:
    """Check every file's sha256, then make `samples` pairs again and compare.

    z must be bit-equal (within 1e-5 of a generator that draws its own), z_positive within 1e-5, pixels within the
    codec's tolerance: one level where it is lossless (rounding depends on the batch size), 16 for JPEG (the image made
    again is encoded, too). Where the identity's generator_level is half or graph, the tolerance is at least 9 levels,
    and a thousandth of an image's values may exceed it.

    Args:
        source: in float32 even where the pairs' generator was not, as half precision depends on the device.
        identity: as given to `write_pairs`.
        seed: chooses the pairs.

    Returns:
        shards, samples (pairs compared), max_level_difference (the largest one within the tolerance).

    Raises:
        UsageError: shards are missing, or the folder holds pairs of another identity.
        CorruptArtifactError: a shard differs, or is not listed; the message names it, and the pair's key where one
            differs.
    """
    folder = Path(folder)
    index = read_complete_index(folder)
    require_same(
        folder, index, json.loads(json.dumps(identity)), latent_dim=source.latent_dim, positives=source.positives
    )
    check_shards([(folder, shard) for shard in index.shards])
    if unlisted := unlisted_shards(folder, index.shards):
        raise CorruptArtifactError(
            f"{folder} holds shards that its index does not list: {', '.join(unlisted)}: delete them"
        )
    chosen = torch.randperm(index.count, generator=seeds.generator(seed, "verify"))[:samples].sort().values
    pairs, largest = PairDataset(folder, check=False), 0
    half = identity.get("generator_level") in ("half", "graph")
    with torch.no_grad():
        for shard in index.shards:
            here = chosen[(chosen >= shard.first) & (chosen < shard.first + shard.count)].tolist()
            for start in range(0, len(here), _BATCH):
                largest = max(largest, _compare(pairs, source, shard, here[start : start + _BATCH], half))
    return {"shards": len(index.shards), "samples": len(chosen), "max_level_difference": largest}


def _compare(pairs: PairDataset, source: PairSource, shard: Shard, chosen: list[int], half: bool) -> int:
    """Make chosen pairs of a shard again; returns the largest difference of pixels, in levels."""

    def fault(index: int, what: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"{pairs.folder / shard.name}: pair {key(index)}: {what}: {REMEDY}")

    records = [pairs.record(index) for index in chosen]
    stored = _read_latents(pairs, shard)
    for index, record in zip(chosen, records, strict=True):
        z, z_positive = (tensor[index - shard.first].double() for tensor in stored.values())
        displacement = float(displacements(z[None], z_positive[None]))
        recorded = record["index"], record["displacement"]
        if recorded[0] != index or abs(recorded[1] - displacement) > 1e-6 * max(1.0, displacement):
            what = f"its JSON says index {recorded[0]}, displacement {recorded[1]}, its latents {displacement:.7g}"
            raise fault(index, what)
        label = None if source.label_of is None else source.label_of(index)
        if record.get("label") != label:
            raise fault(index, f"its JSON says label {record.get('label')}, expected {label}")
    own = pairs.index.identity.get("prior") == "own"  # its network may round otherwise on another device
    made = source.draw([record["seed"] for record in records])
    for row, index in enumerate(chosen):
        for (name, values), new in zip(stored.items(), made, strict=True):
            old, tolerance = values[index - shard.first], 1e-5 if name != "z" or own else 0
            if not torch.allclose(new[row], old, rtol=tolerance, atol=tolerance):
                difference = float((new[row] - old).abs().max())
                seed = records[row]["seed"]
                raise fault(index, f"{name} differs by {difference:.3g} from what seed {seed} gives")
    labels = source.labels(chosen)
    images = [to_uint8(source.images(z, labels)).cpu() for z in (made[0], *each_positive(made[1]))]
    codec, largest = CODECS[pairs.index.codec], 0
    tolerance = max(codec.tolerance, _HALF_TOLERANCE) if half else codec.tolerance
    for row, index in enumerate(chosen):
        anchor, positives, _ = pairs[index]
        positives = positives.view(-1, *anchor.shape)
        names = ("anchor", *["positive"] * len(positives))
        for name, old, new in zip(names, (anchor, *positives), images, strict=True):
            again = codec.decode(codec.encode(new[row].permute(1, 2, 0).contiguous().numpy()), new[row].shape, name)
            level = level_difference(again, old, ignored=old.numel() // 1000 if half else 0)
            if level > tolerance:
                raise fault(index, f"its {name} image differs by {level} levels")
            largest = max(largest, level)
    return largest


def level_difference(one: Tensor, other: Tensor, ignored: int = 0) -> int:
    """Largest difference of two uint8 images' values but for the `ignored` largest ones."""
    return int((one.int() - other.int()).abs().flatten().sort().values[-1 - ignored])


def _read_latents(pairs: PairDataset, shard: Shard) -> dict[str, Tensor]:
    """z and z_positive of a shard, in this order."""
    path = pairs.folder / sidecar(shard.name)
    tensors, _ = artifacts.decode_tensors(read_bytes(path), path)  # its digest is in the index
    count, dim, several = shard.count, pairs.index.latent_dim, pairs.index.positives
    shapes = {"z": (count, dim), "z_positive": (count, dim) if several == 1 else (count, several, dim)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        wanted = " and ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise CorruptArtifactError(f"{path} does not hold {wanted}: {REMEDY}")
    return {name: tensors[name] for name in ("z", "z_positive")}
