"""Average precision against a published answer, a literal scorer and both COCO libraries."""

from pathlib import Path

import numpy as np
import pytest
import torch

from copgen_fast.evals._voc_ap import (
    THRESHOLDS,
    Found,
    Truth,
    average_precisions,
    coco_ap,
    coco_available,
    pixel_iou,
    voc_ap,
)

needs_coco = pytest.mark.skipif(not coco_available(), reason="faster-coco-eval is not installed")


def truth_of(boxes, labels=None, difficult=None):
    count = len(boxes)
    return Truth(
        torch.tensor(boxes, dtype=torch.float64).view(-1, 4),
        torch.tensor([0] * count if labels is None else labels, dtype=torch.int64),
        torch.tensor([False] * count if difficult is None else difficult, dtype=torch.bool),
    )


def found_of(boxes, scores, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return Found(boxes, torch.tensor(labels, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64))


def published():
    images = {}
    for line in (Path(__file__).parent / "voc_ap_fixture.txt").read_text().splitlines():
        if not line.startswith("#"):
            image, kind, *numbers = line.split()
            *score, left, top, width, height = map(float, numbers)
            box = [left, top, left + width, top + height]
            images.setdefault(image, {"truth": [], "found": []})[kind].append((box, *score))
    truth = [truth_of([box for (box,) in image["truth"]]) for image in images.values()]
    found = [found_of(*zip(*image["found"], strict=True)) for image in images.values()]
    return truth, found


@pytest.mark.parametrize(("eleven_points", "answer"), [(True, 0.2684), (False, 0.2457)])
def test_the_published_answer(eleven_points, answer):
    truth, found = published()
    assert (len(truth), sum(len(x.boxes) for x in truth), sum(len(x.boxes) for x in found)) == (7, 15, 24)
    (ap,) = average_precisions(truth, found, (0.3,), eleven_points)[0]
    assert ap == pytest.approx(answer, abs=5e-5)


def random_boxes(seed, images=12, classes=3, exact=False):
    """Annotated boxes and detections near them, some doubled, some anywhere; scores without ties."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = rng.integers(0, 6)
        corners = rng.integers(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(8, 40, (count, 2))], 1).astype(float)
        labels = rng.integers(0, classes, count)
        truth.append(truth_of(boxes.tolist(), labels.tolist(), (rng.random(count) < 0.2).tolist()))
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 3, (2 * count, 4))
        away = np.sort(rng.uniform(0, 100, (3, 2, 2)), 1).reshape(3, 4)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        all_labels = np.concatenate([np.repeat(labels, 2), rng.integers(0, classes, 3)])
        scores = rng.random(2 * count + 3)
        found.append(found_of(np.concatenate([near, away]).tolist(), scores.tolist(), all_labels.tolist()))
    return truth, found


def literal_voc_ap(truth, found, label, least):
    """AP of a class as VOC's code has it: sorted detections, one after the other, eleven points."""
    rows = []
    for image, each in enumerate(found):
        for box, name, score in zip(*(part.tolist() for part in each), strict=True):
            left, top, right, bottom = (float(f"{x:.1f}") for x in (box[0] + 1, box[1] + 1, box[2], box[3]))
            if name == label:
                rows.append((float(f"{score:.3f}"), image, (left, top, right, bottom)))
    rows.sort(key=lambda row: -row[0])
    used, right_ones, wrong_ones = set(), [], []
    wanted = sum(int(((each.labels == label) & ~each.difficult).sum()) for each in truth)
    for _, image, (left, top, right, bottom) in rows:
        best, which = -np.inf, None
        for number, (box, name) in enumerate(zip(truth[image].boxes.tolist(), truth[image].labels, strict=True)):
            if name == label:
                x0, y0, x1, y1 = box[0] + 1, box[1] + 1, box[2], box[3]
                width = max(0, min(x1, right) - max(x0, left) + 1)
                height = max(0, min(y1, bottom) - max(y0, top) + 1)
                common = width * height
                areas = (x1 - x0 + 1) * (y1 - y0 + 1) + (right - left + 1) * (bottom - top + 1)
                if common / (areas - common) > best:
                    best, which = common / (areas - common), number
        hit = best > least
        if hit and truth[image].difficult[which]:
            right_ones.append(0), wrong_ones.append(0)
        elif hit and (image, which) not in used:
            used.add((image, which))
            right_ones.append(1), wrong_ones.append(0)
        else:
            right_ones.append(0), wrong_ones.append(1)
    rights, wrongs = np.cumsum(right_ones), np.cumsum(wrong_ones)
    recall, precision = rights / wanted, rights / np.maximum(rights + wrongs, 1e-12)
    return sum(max(precision[recall >= t], default=0) for t in np.arange(0, 1.1, 0.1)) / 11


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_a_literal_scorer(seed):
    truth, found = random_boxes(seed)
    numbers = voc_ap(truth, found)
    by_threshold = [np.mean([literal_voc_ap(truth, found, label, x) for label in range(3)]) for x in THRESHOLDS]
    assert numbers["ap"] == pytest.approx(np.mean(by_threshold), abs=1e-12) and 0.1 < numbers["ap"] < 0.9
    assert numbers["ap50"] == pytest.approx(by_threshold[0], abs=1e-12)
    assert numbers["ap75"] == pytest.approx(by_threshold[5], abs=1e-12)


def test_what_is_difficult_is_neither_required_nor_wrong():
    boxes = [[0, 0, 10, 10], [50, 50, 80, 80]]
    truth = [truth_of(boxes, difficult=[False, True])]
    assert voc_ap(truth, [found_of(boxes[:1], [0.5])])["ap"] == pytest.approx(1)
    assert voc_ap(truth, [found_of(boxes[::-1], [0.9, 0.5])])["ap"] == pytest.approx(1)
    assert voc_ap(truth, [found_of([[20, 20, 30, 30], *boxes[:1]], [0.9, 0.5])])["ap"] == pytest.approx(0.5)


def test_a_box_found_twice_is_wrong_once_even_beside_a_free_one():
    truth = [truth_of([[0, 0, 10, 10], [0, 0, 10, 8]])]
    twice = [found_of([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8])]
    assert voc_ap(truth, twice)["ap50"] == pytest.approx(6 / 11), "recall 0.5 at precision 1, no second best is tried"


def test_whole_pixels_and_rounding():
    assert pixel_iou(torch.tensor([[1, 1, 10, 10]]), torch.tensor([[1, 1, 10, 5]])).item() == 0.5
    truth = [truth_of([[0, 0, 10, 10]])]
    # 5.04 / 10 is over a half, but not once rounded.
    assert voc_ap(truth, [found_of([[0, 0, 10, 5.04]], [0.9])])["ap50"] == 0
    assert voc_ap(truth, [found_of([[0, 0, 10, 5.06]], [0.9])])["ap50"] == pytest.approx(1)


def test_float32_boxes_round_as_float32():
    # In float32, 0.05 is a little over it and 1.05 a little below: the top is at 1.0, and 9.6 of 19.1 pixels overlap.
    truth = [truth_of([[0, 0, 10, 19.1]])]
    seen = found_of([[0, 0.05, 10, 9.6]], [0.9])
    for boxes, hit in ((seen.boxes.float(), True), (seen.boxes.float().double(), False)):
        assert (voc_ap(truth, [seen._replace(boxes=boxes)])["ap50"] > 0) == hit


def test_nothing_found_is_zero_and_classes_without_boxes_do_not_count():
    truth = [truth_of([[0, 0, 10, 10]], [2]), truth_of([])]
    empty = [found_of([], []), found_of([], [])]
    assert set(voc_ap(truth, empty).values()) == {0.0}
    others = [found_of([[0, 0, 10, 10]] * 2, [0.9, 0.8], [2, 1]), found_of([], [])]
    assert voc_ap(truth, others)["ap"] == pytest.approx(1)


@needs_coco
@pytest.mark.parametrize("seed", range(3))
def test_coco_numbers_are_those_of_pycocotools(seed, capsys):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth, found = random_boxes(seed)
    truth = [each._replace(difficult=torch.zeros_like(each.difficult)) for each in truth]
    annotations, detections = [], []
    for image, (true, seen) in enumerate(zip(truth, found, strict=True)):
        for (x0, y0, x1, y1), label in zip(true.boxes.tolist(), true.labels.tolist(), strict=True):
            row = {"image_id": image, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            annotations.append(row | {"id": len(annotations) + 1, "area": (x1 - x0) * (y1 - y0)})
        for (x0, y0, x1, y1), label, score in zip(*(part.tolist() for part in seen), strict=True):
            row = {"image_id": image, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            detections.append(row)
    whole = coco.COCO()
    whole.dataset = {
        "images": [{"id": n} for n in range(len(truth))],
        "categories": [{"id": n} for n in range(3)],
        "annotations": annotations,
    }
    whole.createIndex()
    scorer = cocoeval.COCOeval(whole, whole.loadRes(detections), "bbox")
    scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    capsys.readouterr()
    assert list(coco_ap(truth, found).values()) == pytest.approx(scorer.stats[:3].tolist(), abs=1e-12)
    assert capsys.readouterr().out == ""


@needs_coco
def test_coco_numbers_ignore_what_is_difficult():
    boxes = [[0, 0, 10, 10], [50, 50, 80, 80]]
    truth = [truth_of(boxes, difficult=[False, True])]
    for found in (found_of(boxes[:1], [0.5]), found_of(boxes[::-1], [0.9, 0.5])):
        assert coco_ap(truth, [found])["ap"] == pytest.approx(1)
    assert set(coco_ap(truth, [found_of([], [])]).values()) == {0.0}
