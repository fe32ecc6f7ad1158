"""What the studies of the paper's tables share: two scales, and rows with the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from copgen_fast.studies import Arm, Settings, Study

TOP1, TOP5 = "linear_augmented_top1_best", "linear_augmented_top5_best"
"""What the paper's linear evaluation reports: of the epoch that did best on the validation images."""
IDENTITY: Settings = {"pairs.positives": "identity"}
REAL: Settings = {"pretrain.data": "real"}
SMALL: Settings = {
    "steering.samples": "12800",
    "steering.lr": "1e-2",  # 400 steps at this rate come as far as thousands at the default's
    "probe.evals": ("linear", "knn"),
}
"""Of every table at small scale, beside the preset `cifar10`."""


@dataclass(frozen=True)
class Config:
    """Options of a table of the paper."""

    scale: Literal["paper", "small"] = "paper"
    """paper: the paper's data and sizes, for GPUs; give --generator.weights (BigBiGAN) and --data.root (ImageNet).
    small: the same rows by the preset cifar10, minutes a run on a CPU; give --generator.weights (its published DCGAN)
    and --data.root (CIFAR-10). Its accuracies are none to compare with the paper's, which are not printed beside."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: of its arm.
        settings: of its arm.
        published: the paper's numbers, per cent; none where the paper lacks the row.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    published: Sequence[float] = ()


def study(
    config: Config,
    number: str,
    title: str,
    preset: str,
    rows: Sequence[Row],
    published: Sequence[str] = (TOP1,),
    metric: str = "linear_augmented_top1_last",
    settings: Settings | None = None,
    small: Settings | None = None,
    small_columns: Sequence[str] = (),
    **compared: Any,
) -> Study:
    """A table of the paper as a study.

    Args:
        number: what the source calls it, "Table 3".
        published: the numbers of `Row.published`, by name.
        metric: of the paper's scale. Of the linear evaluation it is the last epoch's accuracy, as the best epoch's,
            which the paper reports and stands in the next column, is chosen on the images that it is scored on.
        settings: of all arms at the paper's scale.
        small: at small scale, where further columns are `small_columns`.
        compared: the study's `baseline`, by default the first row, and `within`.
    """
    arms = tuple(Arm(row.name, row.settings) for row in rows)
    if config.scale == "small":
        return Study(
            preset="cifar10",
            arms=arms,
            settings={**SMALL, **(small or {})},
            columns=(*small_columns, "knn_top1", "displacement_norm"),
            title=f"{title} (rows of {number} at small scale, on CIFAR-10)",
            **compared,
        )
    numbers = {row.name: [value / 100 for value in row.published] for row in rows if row.published}
    return Study(
        preset=preset,
        arms=arms,
        settings=settings or {},
        metric=metric,
        columns=(*(name for name in published if name != metric), "displacement_norm"),
        published={name: dict(zip(published, values, strict=True)) for name, values in numbers.items()},
        title=title,
        source=f"Li et al. 2022, {number}",
        **compared,
    )
