"""Area probes: linear evaluation of a frozen encoder, beside the reference code's form of it.

Of `linear-augmented` a call is one epoch on image files; `linear-grid` is measured to its answer, beside 60 epochs of
the reference's form, which are estimated from single ones.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from bench.areas import _steps
from bench.areas.codecs import photographs
from bench.baselines.probes import ReferenceProbe
from bench.harness import Call
from bench.rows import Candidate, Options, Row, chosen, compare
from copgen_fast import evals
from copgen_fast.config import DataConfig, EncoderConfig, ProbeConfig, RunConfig
from copgen_fast.encoders import Encoder
from copgen_fast.evals import linear_augmented, linear_grid
from copgen_fast.images import sets
from copgen_fast.runtime import machine, seeds
from copgen_fast.stages import Run

EPOCHS = 60  # of the reference's protocol
EPOCH = 5000  # images of an epoch that is spoken of
_CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A linear evaluation of a frozen encoder on image files of `side` pixels.

    Attributes:
        count: training images, files of `file` pixels (width, height); a 25th as many test images, as ImageNet has, or
            with `grid` an 8th.
        grid: linear-grid by these options to its answer; None: an epoch of linear-augmented.
    """

    encoder: EncoderConfig
    side: int
    count: int
    file: tuple[int, int]
    grid: linear_grid.Config | None = None
    batch: int = 64
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        name = "linear-grid" if self.grid else "linear-augmented"
        width = "" if self.encoder.width == 64 else f"/{self.encoder.width}"
        return f"{name} {self.encoder.name}{width} {self.side}px, {self.count} images"

    def run(self, folder: Path, precision: str, device: torch.device) -> Run:
        data = DataConfig("folder", str(folder), self.side)
        probe = ProbeConfig(("linear-grid",), batch=self.batch, precision=precision)
        return Run(RunConfig(data=data, probe=probe), folder, device)

    def make(self) -> Encoder:
        with seeds.seeded("bench encoder"):
            return Encoder(self.encoder).eval().requires_grad_(False)


CASES = (
    Case(EncoderConfig("resnet18", "imagenet"), 128, 256, (500, 375)),
    Case(EncoderConfig("resnet18", "half", 16), 32, 2000, (32, 32), grid=linear_grid.Config()),
)


def rows(options: Options) -> Iterator[Row]:
    """Benchmark rows of every case, in each precision of the device."""
    for case, device in chosen(CASES, options):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(case, folder)
            probe = ReferenceProbe(
                folder, case.make(), case.make().feature_dim, case.side, case.batch, machine.cores(), device
            )
            peer = f"reference form, PIL, {machine.cores()} processes"
            yield from (_grid_rows if case.grid else _epoch_rows)(case, folder, {peer: probe.epoch}, device, options)


def write_files(case: Case, folder: Path) -> None:
    """JPEG files in class folders (ten classes), for training and testing."""
    width, height = case.file
    images = photographs(16, max(case.file))
    for split, count in (("train", case.count), ("test", case.count // (8 if case.grid else 25))):
        for label in range(_CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
        for i in range(max(count, _CLASSES)):
            picture = Image.fromarray(images[i % len(images)][:height, :width])
            picture.save(folder / split / f"class{i % _CLASSES}" / f"{i:05d}.jpg", quality=90)


def _epoch_rows(
    case: Case, folder: Path, peers: dict[str, Call], device: torch.device, options: Options
) -> Iterator[Row]:
    ours = []
    for precision in _steps.precisions(device, ("fp32", "bf16")):
        call = epochs(case, folder, precision, device)
        bound = _steps.products("encoder", case.count, call, precision, device)
        ours.append(Candidate("probes", str(case), "pytorch", precision, "epoch", call, bound))
    for row in compare(ours, peers, options, device):
        each = EPOCH / case.count / 1e3
        words = f"an epoch of {EPOCH:,}: {row.ours_ms * each:.3g} s, theirs {row.peer_ms * each:.3g} s"
        yield replace(row, limit=f"{row.limit} ({words})")


def epochs(case: Case, folder: Path, precision: str, device: torch.device) -> Call:
    """A function that trains the linear classifier for one more epoch; test features are computed beforehand."""
    run = case.run(folder, precision, device)
    encoder = case.make()
    frozen, data = evals.freeze(encoder, run), sets.open_set(run.config.data)
    classifier = torch.nn.Linear(encoder.feature_dim, _CLASSES).to(device)
    test = frozen.split_features(data, "test", linear_augmented.centre(case.side))
    trained = linear_augmented.train(frozen, data, linear_augmented.Config(epochs=10**6), classifier, 0)

    def epoch() -> None:
        next(trained)
        with torch.no_grad():
            (classifier(test.features.to(device)).argmax(1).cpu() == test.labels).sum().item()

    return epoch


def _grid_rows(
    case: Case, folder: Path, peers: dict[str, Call], device: torch.device, options: Options
) -> Iterator[Row]:
    number = itertools.count()

    def answer() -> dict[str, float]:
        run = case.run(folder, "fp32", device)
        run = replace(run, config=replace(run.config, seed=next(number)))
        return linear_grid.evaluate(case.make(), case.grid, run)

    bound = _steps.products("encoder and heads", case.count, answer, "fp32", device)
    mine = Candidate("probes", str(case), "pytorch", "fp32", "answer", answer, bound)
    for row in compare([mine], peers, options, device):
        changes = {name: EPOCHS * getattr(row, name) for name in ("peer_ms", "ratio", "ratio_low", "ratio_high")}
        yield replace(row, peer=f"{row.peer}, {EPOCHS} epochs, estimated from single ones", **changes)
