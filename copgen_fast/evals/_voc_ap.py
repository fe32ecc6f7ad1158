"""Average precision of detections: PASCAL VOC's, as detectron2 reports it, and COCO's by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = tuple(number / 100 for number in range(50, 100, 5))
"""Least IoU of a match; AP is the mean over them, AP50 and AP75 are those of one."""
# NumPy's steps, whose third is a little over 0.3: VOC's code has them, and a recall of exactly 3 / 10 misses it.
_ELEVEN = np.arange(0.0, 1.1, 0.1)
_IGNORED_AREA = 1e11  # beyond COCO's largest, 1e10


class Truth(NamedTuple):
    """The annotated boxes of an image.

    Attributes:
        boxes: float [K, 4], left, top, right, bottom in pixels, where the image's own left edge is 0.
        labels: int64 [K], classes from 0.
        difficult: bool [K]: detecting them is neither required nor wrong.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Found(NamedTuple):
    """The detections in an image: boxes as in `Truth`, labels int64 [D] and scores float [D]."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


def voc_ap(truth: Sequence[Truth], found: Sequence[Found]) -> dict[str, float]:
    """AP, AP50 and AP75 as detectron2 reports them for VOC 2007, 0 .. 1, means over the classes that occur.

    The mean precision at eleven recalls for each IoU of `THRESHOLDS`, where scores are rounded to three decimals and
    boxes to a tenth of a pixel first. IoUs are of VOC's whole pixels: there a box's left and top are one more than
    here, and right and bottom belong to it. detectron2 counts a class that does not occur as 0, and orders equal scores
    at random: here they stay in the order of images and detections.
    """
    pixel = torch.tensor([1.0, 1, 0, 0])
    truth = [each._replace(boxes=each.boxes.double() + pixel) for each in truth]
    # The pixel is added in the boxes' own precision, as it is there: a float32 near a half rounds as detectron2's does.
    found = [
        Found((each.boxes + pixel).double().round(decimals=1), each.labels, each.scores.double().round(decimals=3))
        for each in found
    ]
    by_class = np.array(list(average_precisions(truth, found).values()))
    means = dict(zip(THRESHOLDS, by_class.mean(0).tolist(), strict=True))
    return {"ap": sum(means.values()) / len(means), "ap50": means[0.5], "ap75": means[0.75]}


def average_precisions(
    truth: Sequence[Truth],
    found: Sequence[Found],
    thresholds: Sequence[float] = THRESHOLDS,
    eleven_points: bool = True,
) -> dict[int, np.ndarray]:
    """AP of each class that `truth` has boxes of, at each threshold, as VOC's code computes it.

    A detection belongs to the box of its class that it overlaps most, by an IoU over the threshold. The one of highest
    score is right, others of the same box are wrong; those of a difficult box are neither.

    Args:
        truth, found: by image, with boxes of whole pixels: both edges belong to them.
        eleven_points: mean precision at recalls 0, 0.1 .. 1 (VOC 2007); False: the area under the precision-recall
            curve, made monotonic (VOC 2010 on).
    """
    labels = torch.cat([each.labels[~each.difficult] for each in truth]).unique().tolist()
    return {label: _of_class(truth, found, label, thresholds, eleven_points) for label in labels}


def _of_class(
    truth: Sequence[Truth], found: Sequence[Found], label: int, thresholds: Sequence[float], eleven_points: bool
) -> np.ndarray:
    scores, overlaps, boxes, ignored = [np.empty(0)], [np.empty(0)], [np.empty(0, int)], [np.empty(0, bool)]
    positives = boxes_before = 0
    for true, seen in zip(truth, found, strict=True):
        true_here, seen_here = true.labels == label, seen.labels == label
        difficult = true.difficult[true_here].numpy()
        positives += int((~difficult).sum())
        if count := int(seen_here.sum()):
            best, which = np.zeros(count), np.zeros(count, int)
            if len(difficult):
                iou = pixel_iou(seen.boxes[seen_here], true.boxes[true_here]).numpy()
                best, which = iou.max(1), iou.argmax(1)
            scores.append(seen.scores[seen_here].double().numpy())
            overlaps.append(best)
            boxes.append(boxes_before + which)
            ignored.append(difficult[which] if len(difficult) else np.zeros(count, bool))
        boxes_before += len(difficult)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    overlap, box, ignore = (np.concatenate(parts)[order] for parts in (overlaps, boxes, ignored))
    return np.array([_ap(overlap > least, box, ignore, positives, eleven_points) for least in thresholds])


def _ap(hit: np.ndarray, box: np.ndarray, ignored: np.ndarray, positives: int, eleven_points: bool) -> float:
    """AP of detections in order of their scores: whether each overlaps its box enough, which box, is it difficult."""
    claims = np.flatnonzero(hit & ~ignored)
    first = claims[np.unique(box[claims], return_index=True)[1]]
    right = np.zeros(len(hit), bool)
    right[first] = True
    wrong = ~right & ~(hit & ignored)
    rights = np.cumsum(right)
    recall, precision = rights / positives, rights / np.maximum(rights + np.cumsum(wrong), np.finfo(float).eps)
    if eleven_points:
        return sum(precision[recall >= least].max(initial=0.0) for least in _ELEVEN) / len(_ELEVEN)
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def pixel_iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU [A, B] of boxes of whole pixels: right and bottom belong to them, so that sides are one longer."""
    one, other = one.double()[:, None], other.double()[None]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2]) + 1).clamp(min=0)
    areas = [(boxes[..., 2:] - boxes[..., :2] + 1).prod(-1) for boxes in (one, other)]
    common = sides.prod(-1)
    return common / (areas[0] + areas[1] - common)


def coco_available() -> bool:
    return find_spec("faster_coco_eval") is not None


def coco_ap(truth: Sequence[Truth], found: Sequence[Found]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75, 0 .. 1, by faster-coco-eval (`pip install 'copgen_fast[detection]'`).

    101 recalls, exact IoUs, each detection matched with the best box that is still free, difficult boxes ignored.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = [
        {
            "id": 0,
            "image_id": image,
            "category_id": label,
            "bbox": _sides(box),
            # Difficult boxes are ignored as those outside of the range of sizes are: as a "crowd" their IoU would be
            # another one.
            "area": _IGNORED_AREA if difficult else _area(box),
            "iscrowd": 0,
        }
        for image, each in enumerate(truth)
        for box, label, difficult in zip(*(part.tolist() for part in each), strict=True)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    detections = [
        {"image_id": image, "category_id": label, "bbox": _sides(box), "score": score}
        for image, each in enumerate(found)
        for box, label, score in zip(*(part.tolist() for part in each), strict=True)
    ]
    if not detections:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    labels = sorted({annotation["category_id"] for annotation in annotations})
    images = [{"id": image} for image in range(len(truth))]
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO({"images": images, "categories": [{"id": n} for n in labels], "annotations": annotations})
        scorer = COCOeval_faster(whole, whole.loadRes(detections), "bbox", print_function=lambda *_: None)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(("ap", "ap50", "ap75"), map(float, scorer.stats[:3]), strict=True))


def _sides(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
