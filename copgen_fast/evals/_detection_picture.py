"""A picture of what a detector finds, beside what is annotated."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

from copgen_fast.evals._voc_ap import Found
from copgen_fast.images.voc import AnnotatedImage, AnnotatedSet

IMAGES, COLUMNS, SIDE = 8, 4, 320
LEAST = 0.5
_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#f032e6",
    "#9a6324",
    "#808000",
    "#000075",
)


def png(test: AnnotatedSet, found: Sequence[Found]) -> bytes:
    """PNG bytes of a few test images: annotated boxes in white, detections of `LEAST` score or more in a colour of
    their class, with name and score.
    """
    count = min(IMAGES, len(found))
    chosen = [number * len(found) // count for number in range(count)]
    drawn = [_drawn(test.images[index], found[index], test.classes) for index in chosen]
    height, width = (max(sides) for sides in zip(*(image.shape[1:] for image in drawn), strict=True))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=255) for image in drawn]
    grid = make_grid(torch.stack(padded), nrow=COLUMNS, padding=4, pad_value=255)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _drawn(image: AnnotatedImage, found: Found, classes: Sequence[str]) -> Tensor:
    """uint8 [3, H, W]: the image, its longer side resized to SIDE, and boxes."""
    scale = SIDE / max(image.height, image.width)
    size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    pixels = torch.from_numpy(image.pixels()).movedim(2, 0)[None]
    canvas = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    if len(image.boxes):
        canvas = draw_bounding_boxes(canvas, image.boxes * scale, colors="white", width=1)
    sure = found.scores >= LEAST
    if sure.any():
        labels, scores = found.labels[sure].tolist(), found.scores[sure].tolist()
        names = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
        canvas = draw_bounding_boxes(canvas, found.boxes[sure] * scale, names, colours, width=2)
    return canvas
