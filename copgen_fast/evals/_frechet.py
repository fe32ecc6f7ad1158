"""How far generated images are from real ones, without outside weights: a Frechet distance in simple features.

Not the FID: that one's features are an Inception network's, trained on ImageNet. Ours see colours, coarse layout
and local texture, no objects: blobs of the right colours can score better than recognisable things. Use them to follow
a training or to find a fault of it, beside the distance between two sets of real images, and look at the samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.ops.checks import expect_tensor
from copgen_fast.runtime import seeds

_CHANNELS = (3, 32, 64, 64)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, equation 6).

    |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), A and B the covariances (n - 1 in the denominator); in
    float64. It grows as the sets shrink, so compare sets of equal sizes only.

    Args:
        features_a, features_b: [N, D] and [M, D], floating, two rows or more each.

    Raises:
        TypeError, ValueError: no such features; the message names which.
    """
    expect_tensor("features_a", features_a, ("N", "D"))
    expect_tensor("features_b", features_b, ("M", features_a.shape[1]))
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if len(features) < 2:
            raise ValueError(f"{name}: expected two rows or more, got {len(features)}")
    (mean_a, root_a), (mean_b, root_b) = _fit(features_a.double()), _fit(features_b.double())
    # With A = X^T X and B = Y^T Y, tr((A B)^(1/2)) is the sum of the singular values of X Y^T.
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum()
    return float((mean_a - mean_b).square().sum() + spread - 2 * overlap)


def _fit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and X [min(N, D), D] whose X^T X is the covariance."""
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    return mean, torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def pixel_features(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] averaged to 4x4 pixels: [N, 48]."""
    expect_tensor("images", images, ("N", 3, "H", "W"))
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


@torch.no_grad()
def random_features(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] through a small fixed random convolutional network: [N, 64].

    Three 3x3 convolutions of stride 2 with ReLU (He's initialisation, one fixed seed), then the mean over positions.
    """
    expect_tensor("images", images, ("N", 3, "H", "W"))
    with seeds.seeded("quality", "random features"):
        layers: list[nn.Module] = []
        for channels, out in zip(_CHANNELS[:-1], _CHANNELS[1:], strict=True):
            conv = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, nn.ReLU()]
    network = nn.Sequential(*layers).to(images.device)
    parts = [network(part.float()).mean((2, 3)) for part in images.split(512)]
    return torch.cat(parts) if parts else images.new_zeros(0, _CHANNELS[-1])


def distances(images: Tensor, real: Tensor) -> dict[str, float]:
    """Both Frechet distances of two sets of images [N, 3, H, W] and [M, 3, H, W] in [-1, 1]."""
    return {
        "frechet_pixels": frechet_distance(pixel_features(images), pixel_features(real)),
        "frechet_random": frechet_distance(random_features(images), random_features(real)),
    }
