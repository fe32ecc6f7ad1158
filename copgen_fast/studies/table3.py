"""The paper's Table 3: ways of making positives on ImageNet-100, with data augmentation T_x in pretraining and without.

Beside the paper's seven rows, `untrained-navigator`, a control that the paper lacks. Navigators are trained with T_x
in all rows, as the paper's text of its Table 4 tells. Without T_x, the reference code cuts the middle 7/8 out of each
image of a pair; here views are the images as they are. What the last rows differ by from each other is tested by
--baseline "gaussian T_x=none" or the like.

The paper's numbers are of one run each, on 5,000 validation images.
"""

from __future__ import annotations

from copgen_fast.studies import Study
from copgen_fast.studies._paper import IDENTITY, Config, Row, study

_PUBLISHED = {"gaussian": (62.62, 28.90), "steering": (63.08, 28.68), "untrained-navigator": (), "navigator": (63.96, 37.40)}


def build(config: Config) -> Study:
    """`T_x=none` in a row's name: pretrained without augmentation."""
    rows = [Row("identity", IDENTITY, (58.26,))]
    for suffix, settings, column in (("", {}, slice(0, 1)), (" T_x=none", {"pretrain.augmentation": "none"}, slice(1, 2))):
        rows += [
            Row(f"{way}{suffix}", {"pairs.positives": way, **settings}, numbers[column])
            for way, numbers in _PUBLISHED.items()
        ]
    return study(config, "Table 3", "Ways of making positives, with and without T_x", "imagenet100", rows)
