"""z' = z + T_z(z), T_z as initialised: tells what learning adds from the mere size of the displacement."""

from __future__ import annotations

from typing import Any

from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.positives.navigator import as_positive, held, untrained


def build(setting: Setting) -> PositiveFunction:
    return as_positive(untrained(setting.latent_dim, setting.navigator, setting.seed, setting.latent_groups))


def record(setting: Setting) -> dict[str, Any]:
    return {"navigator_seed": setting.seed} | held(setting.navigator)
