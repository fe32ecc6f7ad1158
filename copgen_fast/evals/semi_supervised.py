"""Semi-supervised learning: the whole encoder is fine-tuned on a few per cent of the labels, by VISSL's settings."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.config import Side
from copgen_fast.errors import UsageError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, count_classes, freeze, real_images
from copgen_fast.evals._vissl import epoch_order, stepped, test_view, train_view
from copgen_fast.evals.linear import accuracies
from copgen_fast.files import expect_file, read_bytes
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.split import ArraySplit, Split
from copgen_fast.images.stream import ImageBatch
from copgen_fast.options import Count, LearningRate, Place, Range, check_ranges
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.training import loop, optimizers
from copgen_fast.training.loop import StepResult


@dataclass(frozen=True)
class Config:
    """Options of semi-supervised fine-tuning; the defaults are VISSL's."""

    fractions: tuple[Annotated[float, Range(1e-6, 1)], ...] = (0.01, 0.05, 0.1)
    """Shares of the training images whose labels are used, each within the larger ones."""
    lists: tuple[Place, ...] = ()
    """Instead of fractions: files that name the labelled images, a line each, as SimCLR's 1percent.txt does."""
    size: Side = 224
    """Pixels a side of the crops."""
    epochs: Count = 70
    """Passes over the labelled images."""
    milestones: tuple[Count, ...] = (30,)
    """Epochs after which the learning rate is a tenth."""
    lr: LearningRate = 0.05
    """Learning rate per 256 images, of encoder and classifier."""
    batch: Annotated[int, Range(2)] = 256
    """Images a step; an epoch's last ones that don't fill one are left out, and fewer labelled ones make one step."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check(config: Config, train_labels: Tensor) -> None:
    """Raises UsageError where a list is missing, or a fraction leaves a class without labels."""
    for path in config.lists:
        expect_file(path)
    for fraction in () if config.lists else config.fractions:
        draw(train_labels, fraction, 0)


def check_names(config: Config, split: Split) -> None:
    """Raises UsageError where a list of labelled images names one that is not in the training split."""
    for path in config.lists:
        listed(split, Path(path))


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Fine-tune a copy of the encoder and a linear layer on each set of labelled images; score the test images.

    SGD with Nesterov momentum 0.9, no weight decay, batch norm in training mode. The last epoch's is scored. Raw pixels
    have nothing to fine-tune and give no numbers. A stopped command goes on where it was.

    Returns:
        `semi_supervised_1pct_top1` and, where there are more than five classes, `_top5`, for each fraction; for lists,
        with the file's name in place of `1pct`.

    Raises:
        UsageError: a list that names other images, or a fraction that leaves a class without labels.
        NonFiniteError: a loss that is NaN or infinite.
        Interrupted: a stop was requested.
    """
    if not isinstance(encoder, nn.Module) or not any(True for _ in encoder.parameters()):
        return {}
    frozen, data = freeze(encoder, run), real_images(run)
    train = data.splits["train"]
    if config.lists:
        subsets = {Path(path).stem: listed(train, Path(path)) for path in config.lists}
    else:
        subsets = {
            f"{100 * fraction:g}pct": draw(train.labels, fraction, run.config.seed) for fraction in config.fractions
        }
    found: dict[str, float] = {}
    with contextlib.ExitStack() as made:
        for name, rows in subsets.items():
            model = _model(encoder, frozen, data, config, run)
            folder = made.enter_context(_folder(model, frozen, data, rows, config, run))
            fine_tune(model, frozen, data, rows, name, config, run, folder)
            scores, expected = _scores(model, frozen, data, config, run)
            found |= accuracies(f"semi_supervised_{name}", scores, expected, frozen.correct)
    return found


def draw(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of a share of the images, sorted: class counts differ by one at most, and a smaller share is within.

    Args:
        labels: int64 [N], of 0 .. C - 1. A class with too few images gives all of them.
        seed: decides, with the labels alone, what is drawn.

    Raises:
        UsageError: fewer images than classes.
    """
    counts = labels.bincount()
    total = int(fraction * len(labels) + 1e-6)
    if total < len(counts):
        raise UsageError(
            f"--evals.options semi-supervised.fractions: {fraction:g} of {len(labels)} training images is {total}, "
            f"fewer than the {len(counts)} classes: take {len(counts) / len(labels):.2g} or more"
        )
    generator = seeds.generator(seed, "semi-supervised")
    # Classes give one image each, in a drawn order, round after round: what came first is the share.
    shuffled, turns = torch.randperm(len(labels), generator=generator), torch.randperm(len(counts), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rounds = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    places = rounds * len(counts) + turns[labels[by_class]]
    return by_class[places.argsort()[:total]].sort().values


def listed(split: Split, path: Path) -> Tensor:
    """Indices of the images that the lines of a file name, as FILE or, where several are called so, as CLASS/FILE.

    Raises:
        UsageError: the images have no names, or one that is named is not there or one of several.
    """
    if isinstance(split, ArraySplit):
        raise UsageError(f"{path} names files, and the training images are none: take semi-supervised.fractions")
    names = [line.strip() for line in read_bytes(path).decode(errors="replace").splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{path} is empty: name a training image in each line")
    parts = "/" in names[0]
    found: dict[str, list[int]] = {}
    for index in range(split.count):
        name = split.where(index).rpartition(": ")[2]  # that within a shard, of packed images
        found.setdefault("/".join(name.split("/")[-1 - parts :]), []).append(index)
    if faults := [name for name in names if len(found.get(name, ())) != 1]:
        count = len(found.get(faults[0], ()))
        why = f"{count} are called so, give CLASS/FILE" if count else "it is no training image"
        raise UsageError(f"{path}: {len(faults)} of its lines name no image, such as {faults[0]} ({why})")
    return torch.tensor(sorted({found[name][0] for name in names}))


def _model(encoder: nn.Module, frozen: FrozenEncoder, data: OpenSet, config: Config, run: EvalRun) -> nn.Sequential:
    """A copy of the encoder and a new linear layer: normalised images -> scores."""
    with torch.no_grad():
        probe = torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8)
        dim = frozen.features(probe).shape[1]
    with seeds.seeded(run.config.seed, "semi-supervised"):
        classifier = nn.Linear(dim, count_classes(data))
    return nn.Sequential(copy.deepcopy(encoder), classifier).to(run.device).requires_grad_(True)


def _scores(
    model: nn.Module, frozen: FrozenEncoder, data: OpenSet, config: Config, run: EvalRun
) -> tuple[Tensor, Tensor]:
    """Scores of the test images, float32 [M, C], and their labels."""
    parts = []
    for batch in data.stream("test", test_view(config.size, True)):
        if stop_requested():
            raise Interrupted("stopped in semi-supervised; run the same command to go on")
        if len(batch.images):
            with torch.inference_mode(), devices.autocast(run.device, run.config.probe.precision):
                parts.append((model(frozen.normalize(batch.images)).float().cpu(), batch.labels))
    if not parts:
        raise UsageError(f"{data.where}: no test image can be decoded")
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def fine_tune(
    model: nn.Module,
    frozen: FrozenEncoder,
    data: OpenSet,
    rows: Tensor,
    name: str,
    config: Config,
    run: EvalRun,
    folder: Path,
) -> None:
    """Train all weights of normalised images -> scores on the training images `rows`, and leave it in eval mode.

    Args:
        name: of the images, for messages.
        folder: of its checkpoint and log; it goes on from the checkpoint that is there.
    """
    batch, per_epoch = min(config.batch, len(rows)), max(1, len(rows) // config.batch)
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True)
    scaler = devices.grad_scaler(run.device, run.config.probe.precision)
    ahead: Iterator[ImageBatch] | None = None

    def images_of(index: int) -> ImageBatch:
        nonlocal ahead
        epoch, place = divmod(index, per_epoch)
        if ahead is None or place == 0:
            key = (run.config.seed, "semi-supervised", epoch)
            order = itertools.islice(epoch_order(rows, batch, True, *key), place, None)
            ahead = data.stream("train", train_view(config.size, True, *key), order)
        return next(ahead)

    def step(index: int, part: ImageBatch) -> StepResult:
        sgd.param_groups[0]["lr"] = stepped(config.lr, batch, config.milestones, index // per_epoch)
        loss = torch.zeros((), device=run.device)
        if len(part.images) > 1:  # as batch norm has no statistics of one image, where others can't be decoded
            with devices.autocast(run.device, run.config.probe.precision):
                scores = model(frozen.normalize(part.images))
            loss = F.cross_entropy(scores.float(), part.labels.to(run.device))
            optimizers.descend(loss, scaler, sgd)
        return StepResult({"loss": loss}, {})

    every, steps = run.config.log_every, config.epochs * per_epoch
    plan = loop.Plan(f"semi-supervised {name}", folder, steps, batch, every, run.config.save_every)
    loop.run(step, images_of, {"model": model.train(), "optimizer": sgd, "scaler": scaler}, plan)
    model.eval()


@contextlib.contextmanager
def _folder(
    model: nn.Module, frozen: FrozenEncoder, data: OpenSet, rows: Tensor, config: Config, run: EvalRun
) -> Iterator[Path]:
    """Where a fine-tuning is saved, by a name that all it depends on decides; deleted where the block ends well.

    An encoder may lie where nothing can be written: then another folder, and a stopped fine-tuning starts again.
    """
    settings = dataclasses.replace(config, fractions=(), lists=())
    # Weights alone don't tell a network: not its strides, say.
    network = repr(model), artifacts.tensors_digest(model.state_dict()), frozen.mean, frozen.std, frozen.precision
    key = (network, rows.tolist(), data.where, repr(settings), run.config.seed)
    folder = run.folder / f"semi-supervised-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"a stopped fine-tuning would start again: {error}", stacklevel=3)
        with tempfile.TemporaryDirectory() as other:
            yield Path(other)
        return
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
