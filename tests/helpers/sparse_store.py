"""A packed data set of any size whose shards take no disk: sparse files, all with an index as packing writes it."""

import torch

from copgen_fast.images import store
from copgen_fast.images.store import PLACES, Places, StoredShard, StoredSplit, StoreIndex
from copgen_fast.runtime import artifacts

IMAGE_BYTES, MEMBER_BYTES = 15_000, 17_408


def write(root, shards, count, split="train"):
    """`shards` shards of `count` images each, of as many classes as shards."""
    folder = root / split
    folder.mkdir(parents=True)
    parts, entries = [], []
    for number in range(shards):
        names = [f"{split}/n{number:08d}/n{number:08d}_{image:08d}.JPEG".encode() for image in range(count)]
        ends = torch.tensor([len(name) for name in names]).cumsum(0)
        parts.append(
            {
                "offset": torch.arange(count) * MEMBER_BYTES + 512,
                "bytes": torch.full((count,), IMAGE_BYTES, dtype=torch.int32),
                "shape": torch.tensor([[128, 170]], dtype=torch.int16).repeat(count, 1),
                "label": torch.full((count,), number, dtype=torch.int32),
                "name": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
                "name_end": ends,
            }
        )
        entries.append(StoredShard(f"shard-{number:06d}.tar", count, count * MEMBER_BYTES + 10_240, "0" * 64))
        with open(folder / entries[-1].name, "wb") as file:
            file.truncate(entries[-1].bytes)
    places = Places.join(parts)
    artifacts.write_bytes(folder / PLACES, artifacts.encode_tensors(places, {}))
    stored = StoredSplit(shards * count, tuple(entries), artifacts.tensors_digest(places))
    store.write_index(root, StoreIndex(128, "jpeg", {split: stored}, {}))
