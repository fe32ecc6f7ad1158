"""Object detection by Faster R-CNN R50-C4, all of whose encoder is fine-tuned: PASCAL VOC 07+12 as in the paper's Table
2 and in MoCo (He et al. 2020), or another set in VOC's folders.

Needs a ResNet; other networks, and raw pixels, get no numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.models.resnet import ResNet

from copgen_fast.config import RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals import _detection_picture, _detection_training, _voc_ap
from copgen_fast.evals._detection_training import Recipe
from copgen_fast.evals._faster_rcnn import FasterRCNN, Shape
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, freeze
from copgen_fast.images import voc
from copgen_fast.images.voc import AnnotatedSet
from copgen_fast.options import Count, CountOrZero, LearningRate, Place, Range, check_ranges
from copgen_fast.runtime import artifacts, distributed, seeds
from copgen_fast.runtime.distributed import ALONE

SHARED = True
FOLDER, PICTURE = "detection", "detections.png"
"""In a run folder: FOLDER/ENCODER/PICTURE, ENCODER the first letters of its weights' digest."""

Side = Annotated[int, Range(16, 8192)]
_SCHEDULES = {"paper": (4, 1024), "moco": (16, 1333)}  # images of a batch, pixels of the longer side
_IMAGES_SEEN = 384_000  # 24,000 x 16


@dataclass(frozen=True)
class Config:
    """Options of object detection."""

    root: Place | None = None
    """The folder VOCdevkit, or the one that holds it; None: --data.root."""
    train: tuple[str, ...] = ("2007-trainval", "2012-trainval")
    """Lists of training images, as YEAR-LIST of VOCdevkit/VOC{YEAR}/ImageSets/Main/{LIST}.txt."""
    test: tuple[str, ...] = ("2007-test",)
    """Lists of test images."""
    schedule: Literal["paper", "moco"] = "paper"
    """paper: 96,000 steps of 4 images, up to 1024 pixels long. moco: 24,000 of 16, up to 1333. Else the same: each
    image seen 23 times, the learning rate a tenth from 3/4 and 11/12 on. What follows changes it."""
    iterations: Count | None = None
    """None: 384,000 / batch."""
    batch: Count | None = None
    """Images a step, of all processes together."""
    lr: LearningRate | None = None
    """None: 0.00125 an image of a batch."""
    warmup: CountOrZero | None = None
    """Steps in which the learning rate rises to it; None: 1/240 of all."""
    sizes: tuple[Side, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Pixels that a training image's shorter side is resized to, one of them at random."""
    test_size: Side = 800
    """That of test images."""
    max_size: Side | None = None
    """Most pixels of the longer side."""
    anchors: tuple[Count, ...] = (32, 64, 128, 256, 512)
    """Sides of the anchors in pixels."""
    proposals: Count = 2000
    """Proposals of an image in training."""
    proposals_test: Count = 1000
    rois: Count = 512
    """Proposals of an image that the second stage trains on."""
    precise_bn: CountOrZero = 200
    """Batches that estimate batch norm's statistics anew after training (PreciseBN)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("train", "test", "sizes", "anchors"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one")

    def recipe(self) -> Recipe:
        """The schedule with what the options change."""
        batch, longest = _SCHEDULES[self.schedule]
        batch = self.batch or batch
        iterations = self.iterations or max(1, _IMAGES_SEEN // batch)
        return Recipe(
            iterations=iterations,
            batch=batch,
            lr=self.lr or 0.00125 * batch,
            milestones=(round(iterations * 3 / 4), round(iterations * 11 / 12)),
            warmup=round(iterations / 240) if self.warmup is None else self.warmup,
            sizes=self.sizes,
            test_size=self.test_size,
            max_size=self.max_size or longest,
            precise_bn=self.precise_bn,
        )

    def shape(self) -> Shape:
        """What the detector is built of."""
        return Shape(self.anchors, self.proposals, self.proposals_test, self.rois)


def check_data(config: Config, run_config: RunConfig) -> None:
    """Check the annotations and that every image is there, decoding none.

    Raises:
        UsageError: something is missing or damaged, a class has no training image, or processes don't divide a batch.
    """
    distributed.expect_divisible("detection.batch", config.recipe().batch)
    read(config, run_config)


def read(config: Config, run_config: RunConfig) -> tuple[AnnotatedSet, AnnotatedSet]:
    """The training images that have boxes, and the test images."""
    root = config.root or run_config.data.root
    if root is None:
        raise UsageError(
            "evaluation detection needs the folder that holds VOCdevkit: --evals.options detection.root=FOLDER "
            "(nothing is downloaded)"
        )
    return _read(root, config.train, config.test)


@functools.lru_cache(maxsize=1)  # checked before the first stage, then read for each encoder
def _read(root: str, train_lists: tuple[str, ...], test_lists: tuple[str, ...]) -> tuple[AnnotatedSet, AnnotatedSet]:
    train = voc.read(root, train_lists)
    test = voc.read(root, test_lists, train.classes)
    for part in (train, test) if distributed.first() else ():
        part.warn()
    with_boxes = tuple(image for image in train.images if len(image.labels))
    if not with_boxes or all(image.difficult.all() for image in test.images):
        lists, what = (train_lists, "has") if not with_boxes else (test_lists, "that isn't difficult has")
        raise UsageError(f"{voc.devkit(root)}: no box {what} area and is inside its image in {', '.join(lists)}")
    return dataclasses.replace(train, images=with_boxes), test


def evaluate(encoder: Callable[[Tensor], Tensor], config: Config, run: EvalRun) -> dict[str, float]:
    """Fine-tune a detector around a copy of the encoder and score it on the test images.

    Its checkpoint, log and a picture of detections stay in FOLDER/detection/ENCODER; a run that was killed goes on from
    there.

    Returns:
        `detection_ap`, `detection_ap50` and `detection_ap75` as detectron2 reports them for VOC 2007, and, where
        faster-coco-eval is installed, `detection_coco_ap`, `_coco_ap50` and `_coco_ap75`; nothing where the encoder is
        no ResNet.

    Raises:
        UsageError: data that are not as expected, or a detector of another recipe in the folder.
        NonFiniteError: a loss that is NaN or infinite.
        Interrupted: a stop was requested; the state is saved.
    """
    ranks = getattr(run, "ranks", ALONE)
    if not isinstance(encoder, ResNet):
        if ranks.first:
            print(f"detection: left out for {type(encoder).__name__}, as it needs the stages of a ResNet", flush=True)
        return {}
    train, test = read(config, run.config)
    frozen, recipe = freeze(encoder, run), config.recipe()
    folder = folder_of(encoder, run.folder)
    with seeds.seeded(run.config.seed, "detection"):
        detector = FasterRCNN(encoder, len(train.classes), frozen.mean, frozen.std, config.shape())
    if ranks.first:
        _expect_own(folder / "recipe.json", _record(config, run.config, train, frozen, detector.stride))
    detector = detector.to(run.device, memory_format=torch.channels_last)
    ranks.barrier("the start of detection")
    detector = _detection_training.train(detector, train.images, recipe, run.config, folder, ranks)
    found = _detection_training.detect(detector, test.images, recipe, run.config.probe.precision, ranks)
    truth = [_voc_ap.Truth(image.boxes, image.labels, image.difficult) for image in test.images]
    if ranks.first:
        artifacts.write_bytes(folder / PICTURE, _detection_picture.png(test, found))
    numbers = {f"detection_{name}": value for name, value in _voc_ap.voc_ap(truth, found).items()}
    if _voc_ap.coco_available():
        return numbers | {f"detection_coco_{name}": value for name, value in _voc_ap.coco_ap(truth, found).items()}
    if ranks.first:
        print("detection: COCO's AP is left out, for it pip install 'copgen_fast[detection]'", flush=True)
    return numbers


def folder_of(encoder: ResNet, folder: Path) -> Path:
    """Where in a run's folder the detector of an encoder is."""
    return folder / FOLDER / artifacts.tensors_digest(encoder.state_dict())[:12]


def _record(
    config: Config, run_config: RunConfig, train: AnnotatedSet, frozen: FrozenEncoder, stride: int
) -> dict[str, Any]:
    """What a detector's training depends on beside the encoder's weights, which don't tell its stride."""
    sha = hashlib.sha256()
    for image in train.images:
        sha.update(f"{image.path.name} {image.boxes.tolist()} {image.labels.tolist()}\n".encode())
    options = dataclasses.asdict(config.recipe()) | dataclasses.asdict(config.shape())
    options |= {"classes": train.classes, "mean": frozen.mean, "std": frozen.std, "images": sha.hexdigest()}
    options |= {"stride": stride, "seed": run_config.seed, "precision": run_config.probe.precision, "bn": run_config.bn}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _expect_own(path: Path, wanted: dict[str, Any]) -> None:
    """Write what the training depends on, or compare it with what is there."""
    if path.exists():
        there = artifacts.read_record(path)
        if different := sorted(name for name in wanted if there.get(name) != wanted[name]):
            raise UsageError(
                f"{path.parent} holds a detector that was trained otherwise ({', '.join(different)}): delete that "
                "folder to train another"
            )
    artifacts.write_record(path, wanted)
