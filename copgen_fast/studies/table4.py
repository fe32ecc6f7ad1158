"""The paper's Table 4: parts of T_x left out, for the navigator's training and for pretraining alike, on ImageNet-100.

Without crops or T_x, the reference code cuts the middle 7/8 out of the images in pretraining (not in the navigator's
training); here nothing is cut. The flip stays without colour and without crops, as there. The paper's numbers are of
one run each.
"""

from __future__ import annotations

from copgen_fast.studies import Study
from copgen_fast.studies._paper import Config, Row, study

_POLICIES = {"simclr": 63.96, "no-color": 55.26, "no-crop": 43.84, "none": 36.16}


def build(config: Config) -> Study:
    """Rows are named as the policies."""
    rows = [
        Row(name, {"navigator.augmentation": name, "pretrain.augmentation": name}, (number,))
        for name, number in _POLICIES.items()
    ]
    settings = {"pairs.positives": "navigator"}
    return study(config, "Table 4", "T_x in both stages", "imagenet100", rows, settings=settings, small=settings)
