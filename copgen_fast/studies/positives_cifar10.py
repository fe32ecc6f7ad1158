"""Ways of making positives at equal distance, on CIFAR-10 with its published DCGAN: one to two minutes a run.

Give --generator.weights (cifar10_dcgan.pth) and --data.root (cifar10.npz), as for the preset cifar10. The grid is that
of `positives-digits`: identity, and four ways at every distance E||dz||, with T_x in pretraining and without.

What it can show: the same questions on photographs, small ones: 5,000 pairs for 6 epochs, a ResNet-18 of width 16. Here
an untrained encoder is far below the others, and positives matter where T_x is left out.

What it can't: say anything of the paper's setting, ResNet-50s trained for 100 epochs on 1.3 million pairs of a far
better generator. These encoders are far from converged, and what helps at first need not help in the end; longer
training is --pairs.count and --pretrain.epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from copgen_fast.options import Range, check_ranges
from copgen_fast.studies import Study
from copgen_fast.studies._positives import study


@dataclass(frozen=True)
class Config:
    """Options of the study of positives on CIFAR-10."""

    distances: tuple[Annotated[float, Range(1e-6, 1e6)], ...] = (1.4, 2.1, 3.0)
    """E||dz|| of every way but identity. T_z starts at about 2.1."""
    augmentations: tuple[str, ...] = ("simclr", "none")
    """Policies of pretraining."""

    def __post_init__(self) -> None:
        check_ranges(self)


def build(config: Config) -> Study:
    settings = {
        "steering.samples": "12800",
        "steering.lr": "1e-2",
        "pairs.count": "5000",
        "pairs.codec": "raw",
        "pretrain.epochs": "6",
    }
    return study("cifar10", "CIFAR-10", config.distances, config.augmentations, settings)
