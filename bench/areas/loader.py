"""Area loader: from shards to views on the device, beside the reference code's image files and PIL.

A call is an epoch from a cold start: nothing is prefetched before it or left unfinished after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import loader as baselines
from bench.harness import Call, Timing
from bench.limits import Limit
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast import augmentations
from copgen_fast.augmentations import random_views
from copgen_fast.config import Codec, PairsConfig
from copgen_fast.images.codecs import CODECS
from copgen_fast.pairs.read import dali
from copgen_fast.pairs.read.loader import Batches, PairBatches, PairDataset, Sampler
from copgen_fast.pairs.write.writer import PairSource, write_pairs
from copgen_fast.runtime import machine, seeds
from copgen_fast.runtime.latents import NamedPrior

_LATENT_DIM = 8
_POLICY = augmentations.get("simclr")


@dataclass(frozen=True)
class Case:
    """`count` pairs of images with `side` pixels a side, in batches of `batch`.

    Attributes:
        alone: only decode; else also make both views, augmented and normalised.
        workers: threads of ours, processes of the peer; None is one for each CPU core.
    """

    codec: Codec
    alone: bool = False
    side: int = 128
    count: int = 512
    batch: int = 64
    workers: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{self.codec} {self.side}px{', decoded only' if self.alone else ''}"

    @property
    def threads(self) -> int:
        return machine.cores() if self.workers is None else self.workers


CASES = tuple(Case(codec, alone) for codec in ("png", "jpeg", "raw") for alone in (False, True))


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case: the plain loader and DALI's, where it is installed."""
    for case, device in chosen(CASES, options):
        with tempfile.TemporaryDirectory() as folder:
            yield from _rows(case, Path(folder), options, device)


def _rows(case: Case, folder: Path, options: Options, device: torch.device) -> Iterator[Row]:
    pairs = write(case, folder / "shards")
    extension = "jpg" if case.codec == "jpeg" else "png"  # the reference code has no raw files
    baselines.write_files(folder / "files", pairs, extension)
    peer = f"reference form, {extension} files, PIL, {case.threads} processes"
    theirs = baselines.epoch(
        folder / "files", extension, case.batch, None if case.alone else _POLICY, case.side, case.threads
    )
    bound = limit(case, pairs)
    precision = "uint8" if case.alone else "fp32"
    ours = [
        Candidate("loader", str(case), backend, precision, "step", call, bound)
        for backend, call in our_epochs(case, pairs, device)
    ]
    yield from compare(ours, {peer: theirs}, options, device)


def write(case: Case, folder: Path) -> PairDataset:
    """Pairs as the stage writes them, of photographs, as a codec's time depends on the content."""
    sample = NamedPrior("normal", _LATENT_DIM)
    source = PairSource(
        lambda z: crops(z, case.side), lambda z, seeds: z + 0.2, _LATENT_DIM, sample, torch.device("cpu")
    )
    write_pairs(folder, source, PairsConfig(count=case.count, shard_size=128, codec=case.codec, batch=64), {})
    return PairDataset(folder)


def crops(z: Tensor, side: int) -> Tensor:
    """A square crop of scikit-learn's photographs for each row of z: [N, 3, side, side]."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).movedim(2, 0).float() / 127.5 - 1 for image in load_sample_images().images]
    found = []
    for row in z.tolist():
        seeded = seeds.generator("crop", *row)
        which, size, top, left = torch.rand(4, generator=seeded).tolist()
        photograph = photographs[int(which * len(photographs))]
        height, width = photograph.shape[1:]
        size = int((0.5 + 0.5 * size) * height)
        top, left = int(top * (height - size)), int(left * (width - size))
        crop = photograph[None, :, top : top + size, left : left + size]
        found.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True))
    return torch.cat(found)


def our_epochs(case: Case, pairs: PairDataset, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Names of our loaders and one epoch of each: shuffled batches on the device, augmented there."""
    order = Sampler(case.count, case.batch, 0)
    order = replace(order, steps=order.steps_per_epoch)
    makers: dict[str, Callable[[], Batches]] = {
        "plain": lambda: PairBatches(pairs, order, 0.0, case.threads, device=device)
    }
    if dali.available():
        makers["dali"] = lambda: dali.DaliBatches(pairs, order, case.threads, device=device)
    else:
        print("left out: dali (not installed)", flush=True)
    for name, make in makers.items():
        yield name, _epoch(case, make())


def _epoch(case: Case, batches: Batches) -> Call:
    def run() -> None:
        for step in range(batches.steps_per_epoch):
            images = batches(step).images
            if not case.alone:
                random_views(images, _POLICY, seeds.generator(0, "bench views", step))

    return run


def limit(case: Case, pairs: PairDataset) -> Limit:
    """Decoding the same images from memory by Pillow on as many cores."""
    files = [tuple(map(bytes, pair.images)) for pair in map(pairs.read, range(case.count))]
    pool, shape = ThreadPoolExecutor(case.threads), (3, case.side, case.side)
    parts = [files[i :: case.threads] for i in range(case.threads)]

    def decode(part: list[tuple[bytes, bytes]]) -> None:
        for pair in part:
            for data in pair:
                CODECS[case.codec].decode(data, shape, "")

    size = sum(len(data) for pair in files for data in pair) / len(files) / 2
    words = (
        f"decoding {2 * case.count} images of {size / 1e3:.1f} kB by Pillow in {case.threads} threads, from memory; "
        f"batches of {case.batch} pairs"
    )

    def read(timing: Timing) -> tuple[str, float]:
        return f"{words} ({case.count / timing.ms * 1e3:.0f} pairs/s)", timing.ms

    return Limit(lambda: list(pool.map(decode, parts)), read)
