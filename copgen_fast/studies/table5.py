"""The paper's Table 5: how many latents T_z is trained on, on ImageNet-100.

A navigator moves farther the longer it is trained, so read the rows beside their E||dz||. At small scale T_z is trained
on a 47th of the samples at 50 times the rate, without a stop, by which E||dz|| grows about as much, by two thirds in
the last row. The paper's numbers are of one run each.
"""

from __future__ import annotations

from copgen_fast.studies import Study
from copgen_fast.studies._paper import Config, Row, study

_SAMPLES = {"200K": ("200000", "4224", 63.96), "400K": ("400000", "8448", 64.12), "600K": ("600000", "12672", 63.56)}


def build(config: Config) -> Study:
    """Rows are named as in the paper; at small scale by thirds of the samples."""
    small = config.scale == "small"
    rows = [
        Row(f"{third} of 3" if small else name, {"navigator.samples": few if small else samples}, (number,))
        for third, (name, (samples, few, number)) in enumerate(_SAMPLES.items(), 1)
    ]
    settings = {"pairs.positives": "navigator"}
    return study(
        config,
        "Table 5",
        "Training samples of T_z",
        "imagenet100",
        rows,
        settings=settings,
        small=settings | {"navigator.delta": "None"},
    )
