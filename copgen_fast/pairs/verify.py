"""Are the shards what they claim to be? Digests of all, and some pairs made again from their seeds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from copgen_fast.errors import CorruptArtifactError
from copgen_fast.pairs.codecs import CODECS, REMEDY
from copgen_fast.pairs.format import Shard, check_file, key, read_complete_index, sidecar
from copgen_fast.pairs.parts import require_same, strangers
from copgen_fast.pairs.read.loader import PairDataset
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.runtime import artifacts, seeds

# What half precision may change in all but a thousandth of an image's values, which generators check as they load,
# and a level for rounding to whole ones.
_HALF_TOLERANCE = 8 + 1
_CHUNK = 64  # pairs made at a time


def verify_pairs(folder: Path, source: PairSource, identity: dict, samples: int = 16, seed: int = 0) -> dict:
    """Check every file's sha256, then make `samples` pairs again and compare.

    z must be bit-equal, z_positive within 1e-5, pixels within the codec's tolerance: one level where it is lossless
    (another batch size rounds otherwise), 16 for JPEG (there the image made again is coded again first). Where the
    identity's generator_level is half or graph, a thousandth of an image's values may differ by more, and the others by
    9 levels where the codec's tolerance is less.

    Args:
        source: of float32 even where the pairs' generator is not: half precision is another on another device.
        identity: as given to `write_pairs`.
        seed: chooses the pairs.

    Returns:
        shards, samples (pairs compared), max_level_difference (at most that, of what is judged).

    Raises:
        UsageError: shards are missing, or the folder holds pairs of another identity.
        CorruptArtifactError: the folder holds other shards too, or one is at fault; the message names the shard, and
            the pair's key where one is at fault.
    """
    folder = Path(folder)
    index = read_complete_index(folder)
    require_same(folder, index, json.loads(json.dumps(identity)), latent_dim=source.latent_dim)
    for shard in index.shards:
        check_file(folder / shard.name, shard.bytes, shard.sha256)
        check_file(folder / sidecar(shard.name), shard.sidecar_bytes, shard.sidecar_sha256)
    if extra := strangers(folder, index.shards):
        raise CorruptArtifactError(
            f"{folder} holds shards that its index does not list: {', '.join(extra)}: delete them"
        )
    chosen = torch.randperm(index.count, generator=seeds.generator(seed, "verify"))[:samples].sort().values
    pairs, largest = PairDataset(folder, check=False), 0
    half = identity.get("generator_level") in ("half", "graph")
    with torch.no_grad():
        for shard in index.shards:
            here = chosen[(chosen >= shard.first) & (chosen < shard.first + shard.count)].tolist()
            for start in range(0, len(here), _CHUNK):
                largest = max(largest, _compare(pairs, source, shard, here[start : start + _CHUNK], half))
    return {"shards": len(index.shards), "samples": len(chosen), "max_level_difference": largest}


def _compare(pairs: PairDataset, source: PairSource, shard: Shard, chosen: list[int], half: bool) -> int:
    """Make chosen pairs of a shard again; returns the largest difference of pixels, in levels."""
    records = [pairs.record(index) for index in chosen]
    stored = _latents(pairs, shard)
    for index, record in zip(chosen, records, strict=True):
        latents = [tensor[index - shard.first].double() for tensor in stored.values()]
        _compare_record(pairs, index, record, float((latents[1] - latents[0]).norm()))
        label = None if source.label_of is None else source.label_of(index)
        if record.get("label") != label:
            raise _fault(pairs, index, f"its JSON says label {record.get('label')}, expected {label}")
    made = source.draw([record["seed"] for record in records])
    largest = 0
    for row, index in enumerate(chosen):
        for (name, values), new in zip(stored.items(), made, strict=True):
            old, tolerance = values[index - shard.first], 0 if name == "z" else 1e-5
            if not torch.allclose(new[row], old, rtol=tolerance, atol=tolerance):
                off = float((new[row] - old).abs().max())
                raise _fault(pairs, index, f"{name} differs by {off:.3g} from what seed {records[row]['seed']} gives")
    images = [source.render(z, source.labels(chosen), "images") for z in made]
    codec = CODECS[pairs.index.codec]
    tolerance = max(codec.tolerance, _HALF_TOLERANCE) if half else codec.tolerance
    for row, index in enumerate(chosen):
        for name, old, new in zip(("anchor", "positive"), pairs[index][:2], images, strict=True):
            again = codec.decode(codec.encode(new[row].permute(1, 2, 0).contiguous().numpy()), new[row].shape, name)
            level = _levels(again, old, half)
            if level > tolerance:
                raise _fault(pairs, index, f"its {name} image differs by {level} levels")
            largest = max(largest, level)
    return largest


def _levels(again: Tensor, old: Tensor, half: bool) -> int:
    """The largest difference of two images; of half precision, but for a thousandth of the values."""
    apart = (again.int() - old.int()).abs().flatten()
    return int(apart.sort().values[-1 - (len(apart) // 1000 if half else 0)])


def _compare_record(pairs: PairDataset, index: int, record: dict, displacement: float) -> None:
    found = (record.get("index"), record.get("displacement"))
    if found[0] != index or abs(found[1] - displacement) > 1e-6 * max(1.0, displacement):
        what = f"its JSON says index {found[0]}, displacement {found[1]}, its latents {displacement:.7g}"
        raise _fault(pairs, index, what)


def _latents(pairs: PairDataset, shard: Shard) -> dict[str, Tensor]:
    """z and z_positive of a shard, in this order."""
    path = pairs.folder / sidecar(shard.name)
    tensors = artifacts.read_tensors(path)
    shape = (shard.count, pairs.index.latent_dim)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {"z": shape, "z_positive": shape}:
        raise CorruptArtifactError(f"{path} does not hold z and z_positive {list(shape)}: {REMEDY}")
    return {name: tensors[name] for name in ("z", "z_positive")}


def _fault(pairs: PairDataset, index: int, what: str) -> CorruptArtifactError:
    name = pairs.index.shards[index // pairs.index.shard_size].name
    return CorruptArtifactError(f"{pairs.folder / name}: pair {key(index)}: {what}: {REMEDY}")
