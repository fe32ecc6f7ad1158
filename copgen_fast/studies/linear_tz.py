"""Linear against nonlinear navigators on ImageNet-100 (the paper's section 4.3, "Linear T_z").

Linear is the reference code's: two affine layers with biases, without the ReLU between them. As initialised it moves z
about 1.4 times as far as the nonlinear one, so that the comparison is one of distance too: see E||dz||. At small scale
both are trained until E||dz|| is 3, which is beyond both starts. The paper's number is of one run.
"""

from __future__ import annotations

from copgen_fast.studies import Study
from copgen_fast.studies._paper import Config, Row, study


def build(config: Config) -> Study:
    """Rows are the kinds of T_z."""
    rows = [
        Row(kind, {"navigator.kind": kind}, (number,)) for kind, number in (("nonlinear", 63.96), ("linear", 61.18))
    ]
    settings = {"pairs.positives": "navigator"}
    return study(
        config,
        "section 4.3",
        "Linear T_z",
        "imagenet100",
        rows,
        settings=settings,
        small=settings | {"navigator.delta": "3.0"},
    )
