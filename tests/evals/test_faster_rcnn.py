"""The detector: its parts' numbers, its losses written out plainly, and where it draws at random."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet50
from torchvision.ops import nms, roi_align

from copgen_fast.evals._faster_rcnn import RATIOS, FasterRCNN, Shape
from tests.helpers.voc_fixtures import tiny_encoder

HALF = (0.5, 0.5, 0.5)
ANCHORS, CLASSES = (16, 32), 3
SMALL = Shape(anchors=ANCHORS, proposals=30, proposals_test=20, rois=512)


def detector(shape=SMALL, encoder=None, **options):
    encoder = encoder or tiny_encoder()
    torch.manual_seed(1)
    model = FasterRCNN(encoder, CLASSES, HALF, HALF, shape)
    for layer in (model.rpn.head.bbox_pred, model.roi_heads.box_predictor.box):
        torch.nn.init.normal_(layer.weight, std=0.05)  # boxes away from the anchors
    return model.double() if options.get("double") else model


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((64, 80), (72, 64))
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    boxes = [[[4.0, 4, 30, 36], [20, 10, 70, 60]], [[10.0, 30, 50, 60]]]
    targets = [{"boxes": torch.tensor(each), "labels": torch.tensor([1, 3])[: len(each)]} for each in boxes]
    return images, targets, [(0, 0), (0, 1)]


def iou(one, other):
    common = max(0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0, min(one[3], other[3]) - max(one[1], other[1])
    )
    return common / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - common)


def deltas_of(box, reference, weights):
    """What must be predicted for `box` at `reference` (Girshick et al. 2014)."""
    (w, h), (rw, rh) = ((x[2] - x[0], x[3] - x[1]) for x in (box, reference))
    shift = [(box[i] + size / 2 - reference[i] - of / 2) / of for i, size, of in ((0, w, rw), (1, h, rh))]
    return [weight * x for weight, x in zip(weights, [*shift, math.log(w / rw), math.log(h / rh)], strict=True)]


def box_of(deltas, reference, size):
    """The box that is predicted, cut at the image's edges."""
    width, height = reference[2] - reference[0], reference[3] - reference[1]
    x, y = reference[0] + width / 2 + deltas[0] * width, reference[1] + height / 2 + deltas[1] * height
    width, height = width * math.exp(deltas[2]), height * math.exp(deltas[3])
    sides = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return [min(max(side, 0), size[1 - i % 2]) for i, side in enumerate(sides)]


def literal_losses(model, images, targets):
    """All anchors and proposals are few enough to be taken: the losses without any draw, image by image."""
    padded = torch.zeros(2, 3, 72, 80, dtype=torch.float64)  # the largest sides, which 16 does not divide
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = (image.double() / 255 - 0.5) / 0.5
    features = model.backbone(padded)
    hidden = F.relu(F.conv2d(features, model.rpn.head.conv[0][0].weight, model.rpn.head.conv[0][0].bias, padding=1))
    logits, shifts = model.rpn.head.cls_logits(hidden), model.rpn.head.bbox_pred(hidden)
    score_loss = box_loss = 0
    proposals = []
    for n, target in enumerate(targets):
        truth, candidates, anchors = target["boxes"].tolist(), [], []
        for y in range(5):
            for x in range(5):
                for number, (ratio, side) in enumerate((r, s) for r in RATIOS for s in ANCHORS):
                    width, height = side / ratio**0.5, side * ratio**0.5
                    centre = 16 * x, 16 * y
                    at = slice(4 * number, 4 * number + 4)
                    anchor = [
                        centre[0] - width / 2,
                        centre[1] - height / 2,
                        centre[0] + width / 2,
                        centre[1] + height / 2,
                    ]
                    anchors.append((anchor, logits[n, number, y, x], shifts[n, at, y, x]))
        overlaps = [[iou(anchor, box) for box in truth] for anchor, _, _ in anchors]
        best_of_box = [max(row[k] for row in overlaps) for k in range(len(truth))]
        for (anchor, logit, shift), row in zip(anchors, overlaps, strict=True):
            best = max(row)
            positive = best >= 0.7 or any(abs(row[k] - best_of_box[k]) < 1e-9 for k in range(len(truth)))
            if positive or best < 0.3:
                score_loss = score_loss - (F.logsigmoid(logit) if positive else F.logsigmoid(-logit))
            if positive:
                wanted = torch.tensor(deltas_of(truth[row.index(best)], anchor, (1, 1, 1, 1)), dtype=torch.float64)
                box_loss = box_loss + (shift - wanted).abs().sum()
            candidates.append((logit.item(), box_of(shift.tolist(), anchor, images[n].shape[1:])))
        candidates = sorted(candidates, key=lambda each: -each[0])[: 6 * 30]
        candidates = [each for each in candidates if min(each[1][2] - each[1][0], each[1][3] - each[1][1]) > 0]
        scores, boxes = (torch.tensor(part, dtype=torch.float64) for part in zip(*candidates, strict=True))
        proposals.append(torch.cat([boxes[nms(boxes, scores, 0.7)[:30]], target["boxes"].double()]))
    losses = {"loss_objectness": score_loss / 512, "loss_rpn_box_reg": box_loss / 512}
    pooled = roi_align(features, proposals, 14, 1 / 16, sampling_ratio=0, aligned=True)
    maps = model.roi_heads.box_head[1](model.roi_heads.box_head[0](pooled))
    predictor, means = model.roi_heads.box_predictor, maps.mean((2, 3))
    scores = F.log_softmax(F.linear(means, predictor.score.weight, predictor.score.bias), 1)
    shifts = F.linear(means, predictor.box.weight, predictor.box.bias)
    class_loss = box_loss = 0
    row = 0
    for boxes, target in zip(proposals, targets, strict=True):
        for proposal in boxes.tolist():
            overlaps = [iou(proposal, box) for box in target["boxes"].tolist()]
            which = overlaps.index(max(overlaps))
            label = target["labels"][which].item() if overlaps[which] >= 0.5 else 0
            class_loss = class_loss - scores[row, label]
            if label:
                wanted = deltas_of(target["boxes"][which].tolist(), proposal, (10, 10, 5, 5))
                own = shifts[row, 4 * label : 4 * label + 4]
                box_loss = box_loss + (own - torch.tensor(wanted, dtype=torch.float64)).abs().sum()
            row += 1
    return losses | {"loss_classifier": class_loss / row, "loss_box_reg": box_loss / row}


def test_losses_are_those_written_out():
    images, targets, keys = batch()
    model = detector(double=True).train()
    reference = copy.deepcopy(model)
    losses = model(images, [{k: v.double() if k == "boxes" else v for k, v in t.items()} for t in targets], keys)
    expected = literal_losses(reference, images, targets)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-6), name
        assert value > 0
    gradients = []
    for each, of in ((losses, model), (expected, reference)):
        sum(each.values()).backward()
        gradients.append({name: parameter.grad for name, parameter in of.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]["backbone.0.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_numbers_of_the_published_detector():
    model = FasterRCNN(resnet50(weights=None), 20, HALF, HALF, Shape())
    assert model.stride == 16
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(33.24e6, abs=1e4)
    anchors = model.rpn.anchor_generator.cell_anchors[0]
    sides = (anchors[:, 2:] - anchors[:, :2]).tolist()
    assert len(sides) == 15 and min(height for _, height in sides) == pytest.approx(32 / 2**0.5)  # 22.63, not 22
    predictor = model.roi_heads.box_predictor
    assert (predictor.score.out_features, predictor.box.out_features) == (21, 84)
    for weight, std in (
        (predictor.score.weight, 0.01),
        (predictor.box.weight, 0.001),
        (model.rpn.head.conv[0][0].weight, 0.01),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert isinstance(model.roi_heads.box_head[1], torch.nn.BatchNorm2d), "the extra norm, with no ReLU behind it"


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 16), ("half", 8), ("cifar", 4)])
def test_images_are_padded_to_the_largest_and_anchors_are_a_stride_apart(stem, stride):
    model, seen = detector(encoder=tiny_encoder(stem=stem)).eval(), []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images, *_ = batch()
    model(images, sides=(0, 90))
    (padded, features), anchors = seen
    assert padded.shape[2:] == (72, 90), "which the stride does not divide"
    assert padded[0, :, 64:].abs().max() == 0 and padded[1, :, :, 64:].abs().max() == 0
    assert padded[0, 0, 3, 5].item() == pytest.approx(2 * images[0][0, 3, 5].item() / 255 - 1)
    height, width = -(-72 // stride), -(-90 // stride)
    assert model.stride == stride and features.shape[2:] == (height, width)
    assert len(anchors) == 2 and anchors[0].equal(anchors[1])
    centres = (anchors[0][:, :2] + anchors[0][:, 2:]).view(height, width, -1, 2) / 2
    down, right = torch.meshgrid(stride * torch.arange(height), stride * torch.arange(width), indexing="ij")
    expected = torch.stack([right, down], 2)[:, :, None].expand_as(centres)
    torch.testing.assert_close(centres, expected.to(centres.dtype), rtol=0, atol=1e-4)


def test_small_boxes_are_kept_and_those_without_area_left_out_last():
    model = detector(Shape(anchors=ANCHORS, proposals=30, score=0.05, detections=3)).eval()
    small = torch.tensor([[5.0, 5, 5.001, 5.0005], [9, 9, 9, 30], [20, 20, 40, 40]])
    logits = torch.full((1, len(small)), 3.0)
    kept, _ = model.rpn.filter_proposals(small[None], logits, [(64, 64)], [len(small)])
    assert kept[0].equal(small[[0, 2]])
    scores = torch.tensor([[0, 9.0, 0, 0], [0, 8, 0, 0], [0, 7, 0, 0], [0, 6, 0, 0]])
    proposals = torch.cat([small, torch.tensor([[44.0, 44, 60, 60]])])
    boxes, _, labels = model.roi_heads.postprocess_detections(scores, torch.zeros(4, 16), [proposals], [(64, 64)])
    torch.testing.assert_close(boxes[0], small[[0, 2]])
    assert labels[0].tolist() == [1, 1], "the box without area was one of the three best"


def test_what_is_drawn_depends_on_an_images_key_alone():
    model = detector(Shape(anchors=ANCHORS, proposals=30, rois=16)).eval()
    sampler = model.roi_heads.fg_bg_sampler
    labels = torch.tensor([1] * 20 + [0] * 30 + [-1] * 10)
    sampler.keys = [(0, 1), (0, 2)]
    positive, negative = sampler([labels, labels])
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [4, 4, 12, 12]
    assert not negative[0][50:].any() and not positive[0][20:].any() and not positive[0].equal(positive[1])
    sampler.keys = [(0, 2)]
    assert sampler([labels])[0][0].equal(positive[1])
    few = torch.tensor([1, 0, 0])
    assert [mask[0].tolist() for mask in sampler([few])] == [[1, 0, 0], [0, 1, 1]]


def test_detections_are_within_their_images_and_limits():
    model = detector(Shape(anchors=ANCHORS, proposals=30, proposals_test=20, score=0.2, detections=7)).eval()
    images, *_ = batch()
    for image, found in zip(images, model(images), strict=True):
        assert 0 < len(found.boxes) <= 7 and (found.scores > 0.2).all() and set(found.labels.tolist()) <= {0, 1, 2}
        assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_the_encoder_stays_as_it_was_and_all_of_its_copy_learns():
    encoder = tiny_encoder().eval().requires_grad_(False)
    before = copy.deepcopy(encoder.state_dict())
    images, targets, keys = batch()
    model = detector(encoder=encoder).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets, keys)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
