"""The paper's Table 1: ImageNet-1K's linear evaluation and VOC's detection, by method and way of making positives.

Beside the paper's eleven rows, `untrained-navigator`, a control that the paper lacks: T_z as initialised. Needs the
folder of VOCdevkit at the paper's scale: --evals.options detection.root=FOLDER. At small scale nothing is detected,
NNCLR has smaller heads, and CIFAR-10 has five times as many real images as there are pairs, and so steps an epoch.

The paper's numbers are of one run each. It leaves open how NNCLR and Neg FT were set (queue, predictor, temperature),
whether InfoMin had its jigsaw branch, and how many trainings of a detector stand behind a number. The settings here are
the presets' (section 4.1) and the methods' own defaults.
"""

from __future__ import annotations

from copgen_fast.studies import Settings, Study
from copgen_fast.studies._paper import IDENTITY, REAL, TOP1, TOP5, Config, Row, study

_DETECTION = ("detection_ap", "detection_ap50", "detection_ap75")


def build(config: Config) -> Study:
    """Rows of `real` in their names are pretrained on real images; their linear classifier has its own rate."""
    small = config.scale == "small"
    rate = {} if small else {"evals.options.linear-augmented.lr": "0.3"}
    heads = {f"method.options.{name}": "256" for name in ("hidden", "predictor_hidden")} if small else {}
    neg_ft: Settings = {"method": "negft"}
    infomin: Settings = {"pretrain.augmentation": "infomin"}
    nnclr: Settings = {"method": "nnclr", **heads}
    real = REAL | rate
    return study(
        config,
        "Table 1",
        "Methods and ways of making positives",
        "imagenet1k",
        (
            Row("identity", IDENTITY, (41.63, 66.57, 51.05, 77.22, 55.77)),
            Row("identity NNCLR", IDENTITY | nnclr, (42.46, 66.46, 50.40, 76.74, 55.00)),
            Row("identity InfoMin", IDENTITY | infomin, (42.83, 67.52, 50.18, 75.68, 54.71)),
            Row("identity Neg FT", IDENTITY | neg_ft, (43.26, 67.21, 50.45, 77.11, 54.88)),
            Row("gaussian", {"pairs.positives": "gaussian"}, (48.73, 73.13, 50.20, 77.03, 54.37)),
            Row("steering", {"pairs.positives": "steering"}, (51.19, 74.97, 51.42, 77.96, 56.43)),
            Row("untrained-navigator", {"pairs.positives": "untrained-navigator"}),
            Row("navigator", {"pairs.positives": "navigator"}, (53.25, 77.16, 53.09, 78.95, 57.99)),
            Row("real", real, (49.44, 75.58, 52.91, 78.68, 58.51)),
            Row("real Neg FT", real | neg_ft, (50.82, 75.09, 51.08, 77.73, 55.05)),
            Row("real InfoMin", real | infomin, (50.93, 75.87, 51.11, 77.58, 55.55)),
            Row("real NNCLR", real | nnclr, (51.97, 76.80, 51.70, 77.93, 56.27)),
        ),
        published=(TOP1, TOP5, *_DETECTION),
        settings={"probe.evals": ("linear-augmented", "detection")},
    )
