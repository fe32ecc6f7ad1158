"""Area images: loading of packed images, beside torchvision's ImageFolder, and packing, beside a Pillow loop.

A call is an epoch from a cold start, or packs all images into a new folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.baselines import images as baselines
from bench.harness import Call, Timing
from bench.limits import Limit
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast.config import Codec, DataConfig
from copgen_fast.images import sets
from copgen_fast.images.pack import PackConfig, pack
from copgen_fast.images.split import Split
from copgen_fast.images.stream import shuffled, stream
from copgen_fast.images.views import Centre

PHOTOGRAPH = 500, 375
"""Width and height in pixels of the JPEG files that are read: the average of ImageNet's."""


@dataclass(frozen=True)
class Case:
    """Loading, or packing, of `count` images of `side` pixels, stored as `codec`, in batches of `batch`.

    Attributes:
        packing: measure packing, else reading.
        workers: threads of ours, processes of the peer.
    """

    codec: Codec
    packing: bool = False
    side: int = 128
    count: int = 512
    batch: int = 64
    workers: int = 2
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        done = "packed" if self.packing else f"read, B={self.batch}"
        return f"{self.codec} {self.side}px {done}"


CASES = (Case("jpeg"), Case("raw"), Case("jpeg", packing=True))


def rows(options: Options) -> Iterator[Row]:
    """Benchmark rows of every case; packing runs on the CPU whatever the device."""
    for case, device in chosen(CASES, options):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            paths = write_photographs(source / "train", case.count)
            measure = _packing if case.packing else _reading
            yield from measure(case, source, paths, Path(folder), options, device)


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 500 x 375 pixels in two class folders: crops of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    random, photographs = np.random.RandomState(0), [Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width = random.randint(photograph.width // 2, photograph.width * 4 // 5)
        height = width * PHOTOGRAPH[1] // PHOTOGRAPH[0]
        left, top = random.randint(photograph.width - width + 1), random.randint(photograph.height - height + 1)
        path = folder / f"n{number % 2:08d}" / f"{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop = photograph.crop((left, top, left + width, top + height))
        crop.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(path)
    return paths


def _reading(
    case: Case, source: Path, paths: list[Path], folder: Path, options: Options, device: torch.device
) -> Iterator[Row]:
    pack(PackConfig(source, folder / "packed", case.side, case.codec, splits=("train",)))
    split = sets.open_set(DataConfig("packed", str(folder / "packed"), case.side), ("train",)).splits["train"]
    peer = f"torchvision's ImageFolder, DataLoader, {case.workers} processes"
    theirs = baselines.epoch(source / "train", case.batch, case.side, case.workers, device)
    ours = Candidate("images", str(case), "plain", "uint8", "step", _epoch(case, split, device), _stored(case, split))
    yield from compare([ours], {peer: theirs}, options, device)


def _epoch(case: Case, split: Split, device: torch.device) -> Call:
    def run() -> None:
        order = shuffled(split.count, case.batch, torch.Generator().manual_seed(0))
        for batch in stream(split, Centre(case.side), order, case.workers):
            batch.images.to(device)

    return run


def _stored(case: Case, split: Split) -> Limit:
    """The physical limit: reading the bytes of all files, without decoding."""
    folder, shards = split.folder, split.stored.shards

    def read() -> None:
        for shard in shards:
            (folder / shard.name).read_bytes()

    size = sum(shard.bytes for shard in shards)

    def words(timing: Timing) -> tuple[str, float]:
        return f"reading {size / 1e6:.1f} MB of shards, {case.count} images of {case.side} px", timing.ms

    return Limit(read, words)


def _packing(
    case: Case, source: Path, paths: list[Path], folder: Path, options: Options, device: torch.device
) -> Iterator[Row]:
    def run() -> None:
        shutil.rmtree(folder / "packed", ignore_errors=True)
        pack(PackConfig(source, folder / "packed", case.side, case.codec, splits=("train",), workers=case.workers))

    def decode() -> None:
        for path in paths:
            Image.open(path).load()

    def words(timing: Timing) -> tuple[str, float]:
        share = timing.ms / case.workers
        return f"decoding {case.count} JPEG files of 500 x 375 pixels by Pillow on {case.workers} cores", share

    peer = f"a loop of Pillow in {case.workers} processes, files"
    theirs = baselines.packing(paths, folder / "files", case.side, case.workers)
    ours = Candidate("images", str(case), "plain", "uint8", "step", run, Limit(decode, words))
    yield from compare([ours], {peer: theirs}, options, torch.device("cpu"))
