"""What keeps a trained navigator's positives in the class of their anchors? On the embedded digits, without T_x.

All arms but `auto` move z as far, E||dz|| = 1.4, so that they differ in direction alone: T_z trained within the ball
of that radius, as in `positives-digits`, and with one change each. `stopped` is the quickstart's rule, 7 % beyond the
start. `centered` subtracts the offset that all latents share. `auto` goes as far as cluster agreement allows.

What it can show: which of these changes gets back what training loses beside an untrained T_z, and whether any is worth
more than that or than noise. What it can't: say that the same holds for photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from copgen_fast.options import Range, check_ranges
from copgen_fast.studies import Arm, Study, positives_digits
from copgen_fast.studies._positives import moved

_CHANGES = {
    "navigator": {},
    "stopped": {"navigator.project": "False", "navigator.delta": "2.0"},
    "near-zero start": {"navigator.init": "near-zero"},
    "no T_x in its training": {"navigator.augmentation": "none"},
    "linear": {"navigator.kind": "linear"},
    "1,280 latents": {"navigator.samples": "1280"},
    "lr 2e-5": {"navigator.lr": "2e-5"},
    "centered": {"positive.options.navigator.centered": "True"},
}


@dataclass(frozen=True)
class Config:
    """Options of the study of navigators on digits."""

    distance: Annotated[float, Range(1e-6, 1e6)] = 1.4
    """E||dz|| of every arm but `auto`, and the radius of the ball."""

    def __post_init__(self) -> None:
        check_ranges(self)


def build(config: Config) -> Study:
    trained = moved("navigator", config.distance)
    untrained = moved("untrained-navigator", config.distance)
    arms = (
        Arm("identity", {"pairs.positives": "identity"}),
        Arm("gaussian", moved("gaussian", config.distance)),
        Arm("untrained", untrained),
        Arm("untrained centered", untrained | {"positive.options.untrained-navigator.centered": "True"}),
        *(Arm(name.replace(",", ""), trained | change) for name, change in _CHANGES.items()),
        Arm("auto", trained | {"navigator.delta": "auto", "positive.options.navigator.distance": "None"}),
    )
    return positives_digits.without_augmentation(
        arms,
        baseline="untrained",
        title="Navigators kept in the class, embedded digits without T_x",
    )
