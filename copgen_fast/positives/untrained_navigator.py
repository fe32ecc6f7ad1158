"""z' = z + T(z) with T as initialised: the control that tells learning from the mere size of the displacement."""

from __future__ import annotations

from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.positives.navigator import as_positive, untrained


def build(setting: Setting) -> PositiveFunction:
    return as_positive(untrained(setting.latent_dim, setting.navigator, setting.seed))
