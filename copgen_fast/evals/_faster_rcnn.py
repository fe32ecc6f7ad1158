"""Faster R-CNN R50-C4 (Ren et al. 2015) as detectron2 builds it for VOC, of torchvision's parts.

Stages 1 to 3 of the encoder are the backbone; stage 4, an extra norm and a mean over positions are the head, as in
MoCo's transfer experiments. Where torchvision's own model differs, this one follows detectron2: L1 losses, the RPN's
divided by 256 an image, RoIAlign aligned to pixel centres with as many samples as fit, anchors that are unrounded and
the stride apart whatever the image's sides, images padded to the largest of a batch alone, small proposals and
detections kept, scores and boxes in float32 under autocast.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from copgen_fast.evals._voc_ap import Found
from copgen_fast.runtime import seeds

RATIOS = (0.5, 1.0, 2.0)
RPN_SAMPLES = 256
_BEFORE_NMS = 6  # times as many proposals go into the RPN's non-maximum suppression as come out at most
_POOLED = 14

Target = dict[str, Tensor]
"""`boxes` float32 [K, 4] in the image's pixels, `labels` int64 [K], classes from 1; 0 is background."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a detector may be built of beside the encoder.

    Attributes:
        anchors: their sides in pixels, each in three ratios.
        proposals, proposals_test: of each image, in training and else.
        rois: proposals of an image that the head trains on.
        score: least score of a detection.
        detections: of an image, at most.
    """

    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    proposals: int = 2000
    proposals_test: int = 1000
    rois: int = 512
    score: float = 0.05
    detections: int = 100


class FasterRCNN(nn.Module):
    """A detector around copies of an encoder's stages.

    In training, images, targets and their keys -> losses by name; else images -> their detections.

    Args:
        encoder: a torchvision ResNet; its weights are copied.
        classes: without the background.
        mean, std: of images in [0, 1], as the encoder was trained.
    """

    def __init__(
        self,
        encoder: ResNet,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        shape: Shape,
    ) -> None:
        super().__init__()
        encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.backbone = nn.Sequential(
            encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool, encoder.layer1, encoder.layer2, encoder.layer3
        )
        self.stride = _stride(encoder)
        channels, features = _channels(encoder.layer3), _channels(encoder.layer4)
        sampler = _Sampler(RPN_SAMPLES, 0.5, "anchors")
        before, after = (
            {"training": factor * shape.proposals, "testing": factor * shape.proposals_test}
            for factor in (_BEFORE_NMS, 1)
        )
        anchors = _Anchors(shape.anchors, self.stride)
        head = _RPNHead(channels, len(shape.anchors) * len(RATIOS))
        self.rpn = _RPN(anchors, head, 0.7, 0.3, RPN_SAMPLES, 0.5, before, after, nms_thresh=0.7)
        self.rpn.fg_bg_sampler = sampler
        self.rpn.min_size = torch.finfo(torch.float32).tiny  # a proposal needs an area, of any size
        self.roi_heads = _RoIHeads(
            _Pool(1 / self.stride),
            nn.Sequential(encoder.layer4, nn.BatchNorm2d(features), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            _Predictor(features, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=shape.rois,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=shape.score,
            nms_thresh=0.5,
            detections_per_img=shape.detections,
        )
        self.roi_heads.fg_bg_sampler = _Sampler(shape.rois, 0.25, "proposals")
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        keys: Sequence[tuple[seeds.Key, ...]] = (),
        sides: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor] | list[Found]:
        """
        Args:
            images: uint8 [3, H, W] each, of any sizes.
            targets: of each image, in training.
            keys: of each image, in training: seed the draw of its anchors and proposals.
            sides: least height and width that images are padded to.
        """
        batch = self._padded(images, sides)
        features = {"0": self.backbone(batch.tensors).to(self.mean.dtype)}
        self.rpn.fg_bg_sampler.keys = self.roi_heads.fg_bg_sampler.keys = keys
        proposals, losses = self.rpn(batch, features, targets)
        found, more = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return losses | more
        return [Found(each["boxes"], each["labels"] - 1, each["scores"]) for each in found]

    def _padded(self, images: Sequence[Tensor], sides: tuple[int, int]) -> ImageList:
        """A batch of normalised images; smaller ones are padded with zeros on the right and below."""
        sizes = [tuple(image.shape[1:]) for image in images]
        height, width = map(max, zip(*sizes, sides, strict=True))
        batch = torch.zeros(len(images), 3, height, width, dtype=self.mean.dtype, device=self.mean.device)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image.to(batch) / 255 - self.mean) / self.std
        return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes)


def _stride(encoder: ResNet) -> int:
    """Pixels between positions of stage 3."""
    first = encoder.conv1.stride[0] * (encoder.maxpool.stride if isinstance(encoder.maxpool, nn.MaxPool2d) else 1)
    return 4 * first


def _channels(stage: nn.Sequential) -> int:
    """Channels of a stage's output."""
    norms = [module for name, module in stage[-1].named_children() if name.startswith("bn")]
    return norms[-1].num_features


class _Anchors(AnchorGenerator):
    """torchvision's AnchorGenerator for one feature map: anchors are not rounded and exactly `stride` pixels apart.

    torchvision divides the image's sides by the map's, which is too few pixels where the last positions reach over the
    image's edge.
    """

    def __init__(self, sizes: Sequence[int], stride: int) -> None:
        super().__init__((tuple(sizes),), (RATIOS,))
        self.stride = stride

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        (features,) = feature_maps
        self.set_cell_anchors(features.dtype, features.device)
        stride = torch.tensor(self.stride, device=features.device)
        (anchors,) = self.grid_anchors([list(features.shape[2:])], [[stride, stride]])
        return [anchors] * len(features)

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


class _RPNHead(RPNHead):
    """torchvision's head, whose outputs are float32, as its inputs, under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [part.to(x[0].dtype) for part in logits], [part.to(x[0].dtype) for part in deltas]


class _Sampler(BalancedPositiveNegativeSampler):
    """torchvision's draw of positives and negatives, from a seed for each image, wherever it is computed."""

    keys: Sequence[tuple[seeds.Key, ...]] = ()

    def __init__(self, count: int, positive_fraction: float, name: str) -> None:
        super().__init__(count, positive_fraction)
        self.name = name

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [self._draw(values, (*key, self.name)) for values, key in zip(labels, self.keys, strict=True)]
        return [positive for positive, _ in chosen], [negative for _, negative in chosen]

    def _draw(self, labels: Tensor, key: tuple[seeds.Key, ...]) -> tuple[Tensor, Tensor]:
        """Masks of the positives (labels of 1 or more) and negatives (0) that are taken."""
        order = torch.randperm(len(labels), generator=seeds.generator(*key)).to(labels.device)
        shuffled = labels[order]
        positive, negative = order[shuffled >= 1], order[shuffled == 0]
        positive = positive[: int(self.batch_size_per_image * self.positive_fraction)]
        negative = negative[: self.batch_size_per_image - len(positive)]
        masks = torch.zeros(2, len(labels), dtype=torch.uint8, device=labels.device)
        masks[0, positive], masks[1, negative] = 1, 1
        return masks[0], masks[1]


class _RPN(RegionProposalNetwork):
    """torchvision's region proposals with detectron2's losses: sums over the sampled anchors / (256 x images)."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, RPN_SAMPLES * len(labels)
        scores = objectness.flatten()[sampled]
        score_loss = F.binary_cross_entropy_with_logits(scores, torch.cat(labels)[sampled], reduction="sum")
        differences = pred_bbox_deltas[positive] - torch.cat(regression_targets)[positive]
        return score_loss / count, differences.abs().sum() / count


class _RoIHeads(RoIHeads):
    """torchvision's RoIHeads with detectron2's losses: L1 on the box of the true class, divided by the number of RoIs.

    Detections without area count among the best ones and are left out last.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        labels = wanted = None
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        if not self.training:
            found = self.postprocess_detections(scores, deltas, proposals, image_shapes)
            return [
                dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)
            ], {}
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        positive = labels.nonzero().flatten()
        own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = (own - wanted[positive]).abs().sum() / len(labels)
        return [], {"loss_classifier": F.cross_entropy(scores, labels), "loss_box_reg": box_loss}

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Each image's detections after non-maximum suppression, best first: boxes, scores and labels (from 1)."""
        counts = [len(each) for each in proposals]
        every_box = self.box_coder.decode(box_regression, proposals).split(counts)
        every_score = class_logits.softmax(1).split(counts)
        found = []
        for boxes, scores, shape in zip(every_box, every_score, image_shapes, strict=True):
            rows, labels = (scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
            labels = labels + 1
            boxes, scores = clip_boxes_to_image(boxes[rows, labels], shape), scores[rows, labels]
            best = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            best = best[(boxes[best, 2:] > boxes[best, :2]).all(1)]
            found.append((boxes[best], scores[best], labels[best]))
        return tuple(map(list, zip(*found, strict=True)))


class _Pool(nn.Module):
    """RoIAlign of one map to 14 x 14, aligned to pixel centres, with as many samples as a cell has pixels."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor]) -> Tensor:
        return roi_align(features["0"], proposals, _POOLED, self.scale, sampling_ratio=0, aligned=True)


class _Predictor(nn.Module):
    """Scores [R, C + 1] and boxes of every class [R, 4 (C + 1)], in float32 under autocast."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.score, self.box = nn.Linear(features, classes + 1), nn.Linear(features, 4 * (classes + 1))
        for layer, std in ((self.score, 0.01), (self.box, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.score.weight.dtype
        return self.score(features).to(dtype), self.box(features).to(dtype)
