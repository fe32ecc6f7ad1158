"""The paper's Table 3: ways of making positives on ImageNet-100, with data augmentation T_x in pretraining and without.

Beside the paper's seven rows, `untrained-navigator`, a control that the paper lacks. Navigators are trained with T_x in
all rows; Table 4 leaves it out of both stages. Without T_x, the reference code cuts the middle 7/8 out of each image of
a pair; here views are the images as they are. Each row is compared with the Gaussian one of its T_x, the simplest that
both parts have.

The paper's numbers are of one run each, on 5,000 validation images.
"""

from __future__ import annotations

from copgen_fast.studies import Study
from copgen_fast.studies._paper import IDENTITY, Config, Row, study

_WITH = {"gaussian": (62.62,), "steering": (63.08,), "untrained-navigator": (), "navigator": (63.96,)}
_WITHOUT = {"gaussian": (28.90,), "steering": (28.68,), "untrained-navigator": (), "navigator": (37.40,)}


def build(config: Config) -> Study:
    """`T_x=none` in a row's name: pretrained without augmentation."""
    none = {"pretrain.augmentation": "none"}
    rows = [
        Row("identity", IDENTITY, (58.26,)),
        *(Row(way, {"pairs.positives": way}, numbers) for way, numbers in _WITH.items()),
        *(Row(f"{way} T_x=none", {"pairs.positives": way} | none, numbers) for way, numbers in _WITHOUT.items()),
    ]
    return study(
        config,
        "Table 3",
        "Ways of making positives, with and without T_x",
        "imagenet100",
        rows,
        baseline="gaussian",
        within=("pretrain.augmentation",),
    )
