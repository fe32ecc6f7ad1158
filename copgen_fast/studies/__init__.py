"""Studies: the same run with several settings and seeds, compared. One file each, named as on the command line.

Each file has `build(config) -> Study` and may have `Config`, a frozen dataclass of its options. `python -m
copgen_fast.study` runs a study's arms once per seed, each as an ordinary command of `python -m copgen_fast.train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, str | tuple[str, ...]]
"""Settings as words, by the dotted names of config.json:
{"pairs.positives": "gaussian", "positive.options.gaussian.std": "0.2", "probe.evals": ("linear", "knn")}."""


@dataclass(frozen=True)
class Arm:
    """One row of a study: the settings in which its runs differ from those of other rows.

    Attributes:
        name: in tables, and as the name of its folder: letters, digits, spaces and -_.=+.
        settings: beside those of the study.
    """

    name: str
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is run and how its results are shown.

    Attributes:
        preset: of `copgen_fast.presets`, which `settings` change.
        arms: rows in their order.
        settings: of all arms.
        baseline: name of the arm that others are compared with; empty: the first.
        within: settings within whose values arms are compared: each with that which has its values of these and else
            the baseline's settings, ("pretrain.augmentation",) with the same T_x.
        metric: the number that is tested, named before anything runs: accuracies as the evaluations call them.
        columns: further numbers of the table, untested.
        published: the paper's numbers to print beside, by arm and metric (accuracies as fractions).
        title: one line.
        source: of the published numbers, such as "Li et al. 2022, Table 3".
    """

    preset: str
    arms: tuple[Arm, ...]
    settings: Settings = field(default_factory=dict)
    baseline: str = ""
    within: tuple[str, ...] = ()
    metric: str = "linear_top1"
    columns: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    title: str = ""
    source: str = ""
