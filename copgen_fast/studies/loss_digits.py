"""Does the order of ways of making positives depend on the loss? On the embedded digits, without T_x.

Noise, an untrained and a trained navigator, all at E||dz|| = 1.4, with pretraining's temperature .1 as everywhere else,
lower and higher; the navigator also trained against an f of those temperatures; and noise with three positives an
anchor, beside one positive for as many images.

What it can show: whether the loss of training T_z, as `positives-digits` has it, is one of a temperature, and whether
several positives are worth more than as many new pairs. What it can't: say that the same holds for photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from copgen_fast.options import Range, Temperature, check_ranges
from copgen_fast.studies import Arm, Study, positives_digits
from copgen_fast.studies._positives import SEVERAL, moved

_WAYS = ("gaussian", "untrained-navigator", "navigator")


@dataclass(frozen=True)
class Config:
    """Options of the study of losses on digits."""

    distance: Annotated[float, Range(1e-6, 1e6)] = 1.4
    """E||dz|| of every arm, and the radius of the ball of T_z."""
    temperatures: tuple[Temperature, ...] = (0.03, 0.5)
    """Of pretraining, and of the navigator's training, beside 0.1."""

    def __post_init__(self) -> None:
        check_ranges(self)


def build(config: Config) -> Study:
    ways = {way: moved(way, config.distance) for way in _WAYS}
    temperatures = [f"{temperature:g}" for temperature in config.temperatures]
    arms = (
        *(Arm(way, settings) for way, settings in ways.items()),
        *(
            Arm(f"{way} pretrain temperature={value}", settings | {"method.options.temperature": value})
            for value in temperatures
            for way, settings in ways.items()
        ),
        *(
            Arm(f"navigator trained at temperature={value}", ways["navigator"] | {"navigator.temperature": value})
            for value in temperatures
        ),
        Arm("gaussian 3 positives", ways["gaussian"] | SEVERAL),
    )
    return positives_digits.without_augmentation(
        arms,
        baseline="gaussian",
        within=("method.options.temperature",),
        title="Ways of making positives under other losses, embedded digits without T_x",
    )
