"""Ways of making positives at equal distance, on the embedded digits: needs no file, and half a minute a run.

identity, and Gaussian noise, an untrained navigator, a trained one and steering, each at every distance E||dz||, with
the digits' augmentation T_x in pretraining and without any. Navigators are trained with T_x in both cases.

What it can show: whether a way of making positives matters here, beyond the spread over seeds, at one and the same
distance; whether training T_z is worth more than leaving it as initialised; how far is too far; and how all of that
depends on T_x. `pairs_agreement_top1` is how often the encoder's own linear classifier gives anchor and positive one
class: a poor encoder sees changes that there are not, so compare it among encoders of like accuracy.

What it can't: say anything of photographs. A small network was fitted to 1,437 scans, the same that encoders are
evaluated by; raw pixels, of which 97 % are told right, do better than encoders trained as briefly as these; and 360
test scans tell no differences below two points in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from copgen_fast.options import Range, check_ranges
from copgen_fast.studies import Arm, Study
from copgen_fast.studies._positives import COLUMNS, study


@dataclass(frozen=True)
class Config:
    """Options of the study of positives on digits."""

    distances: tuple[Annotated[float, Range(1e-6, 1e6)], ...] = (0.7, 1.4, 2.1, 3.0)
    """E||dz|| of every way but identity. T_z starts at about 1.9."""
    augmentations: tuple[str, ...] = ("digits", "none")
    """Policies of pretraining."""

    def __post_init__(self) -> None:
        check_ranges(self)


def build(config: Config) -> Study:
    settings = {
        "probe.evals": ("linear", "lowshot", "knn", "pairs"),
        # The scans are 8 x 8 pixels: 16 lose nothing, and are four times as fast as 32.
        "pairs.size": "16",
        "data.image_size": "16",
        "navigator.view_size": "16",
        "navigator.samples": "12800",
        "navigator.batch": "128",
        "navigator.lr": "5e-4",
        "pairs.count": "4096",
        "pairs.codec": "raw",
        "pretrain.encoder.stem": "half",
        "pretrain.epochs": "3",
        "pretrain.batch": "128",
        "pretrain.lr": "0.1",
    }
    columns = ("lowshot_top1", *COLUMNS)
    return study("quickstart", "embedded digits", config.distances, config.augmentations, settings, columns)


def without_augmentation(arms: Sequence[Arm], baseline: str, title: str, within: tuple[str, ...] = ()) -> Study:
    """A study of other arms with this one's settings and columns, pretrained without T_x."""
    base = build(Config())
    settings = {**base.settings, "pretrain.augmentation": "none"}
    return replace(base, arms=tuple(arms), settings=settings, baseline=baseline, within=within, title=title)
