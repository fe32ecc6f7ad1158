"""Labelled image sets for probing and for real-image baselines, in memory as uint8 tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """A data set with its two splits.

    Attributes:
        train_images, test_images: uint8 [N, 3, H, W].
        train_labels, test_labels: int64 [N], in 0 .. num_classes - 1.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def digits(image_size: int = 32) -> LabelledImages:
    """scikit-learn's handwritten digits: 1797 real 8x8 scans of 17 grey levels, ten classes.

    The split is fixed (stratified; 1437 to train on, 360 held out). Scans are upsampled by bicubic
    interpolation to `image_size` and repeated to three channels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images = resize(torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16, image_size)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(labels).long()
    train, test = (torch.tensor(part) for part in indices)
    return LabelledImages(images[train].contiguous(), labels[train], images[test].contiguous(), labels[test])


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of float images [N, C, H, W] in [0, 1]; the result may overshoot that range."""
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
