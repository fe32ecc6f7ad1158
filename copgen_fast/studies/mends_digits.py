"""Do longer steps, several positives or a part of z mend what training T_z loses? On the embedded digits, without T_x.

All arms move z as far, E||dz|| = 1.4, beside noise, an untrained T_z and one trained within the ball of that radius, as
in `navigator-digits`. `rescaled` is trained as long without the ball and scaled to the distance afterwards. `3
positives` come with half as many anchors, for as many images and steps; T_z makes one positive of an anchor, so that
its three are one image. `first half` and `second half` move only these coordinates of z, as latent groups.

What it can show: which of these changes gets back what training loses beside an untrained T_z. What it can't: say that
the same holds for photographs, or for a generator whose groups act on different layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from copgen_fast.options import Range, check_ranges
from copgen_fast.studies import Arm, Study, positives_digits
from copgen_fast.studies._positives import SEVERAL, moved

_FIRST, _SECOND = ({"generator.options.groups": "32,32", "navigator.groups": group} for group in "01")


@dataclass(frozen=True)
class Config:
    """Options of the study of mends on digits."""

    distance: Annotated[float, Range(1e-6, 1e6)] = 1.4
    """E||dz|| of every arm, and the radius of the ball where there is one."""

    def __post_init__(self) -> None:
        check_ranges(self)


def build(config: Config) -> Study:
    ways = ("gaussian", "untrained-navigator", "navigator")
    gaussian, untrained, trained = (moved(way, config.distance) for way in ways)
    arms = (
        Arm("gaussian", gaussian),
        Arm("untrained", untrained),
        Arm("navigator", trained),
        Arm("navigator rescaled", trained | {"navigator.project": "False", "navigator.delta": "None"}),
        Arm("gaussian 3 positives", gaussian | SEVERAL),
        Arm("navigator 3 positives", trained | SEVERAL),
        Arm("untrained first half", untrained | _FIRST),
        Arm("navigator first half", trained | _FIRST),
        Arm("navigator second half", trained | _SECOND),
    )
    return positives_digits.without_augmentation(
        arms,
        baseline="untrained",
        title="Further changes of a trained navigator, embedded digits without T_x",
    )
