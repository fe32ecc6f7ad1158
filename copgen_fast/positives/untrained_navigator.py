"""z' = z + T_z(z), T_z as initialised: tells what learning adds from the mere size of the displacement."""

from __future__ import annotations

from typing import Any

from copgen_fast.positives import PositiveFunction, Setting
from copgen_fast.positives.navigator import Config as Config
from copgen_fast.positives.navigator import as_positive, held, start


def build(setting: Setting) -> PositiveFunction:
    return as_positive(start(setting), "untrained-navigator", setting)


def record(setting: Setting) -> dict[str, Any]:
    made = {"kind": "nonlinear", "hidden": None, "init": "default"}
    other = {name: value for name in made if (value := getattr(setting.navigator, name)) != made[name]}
    return (
        {"navigator_seed": setting.seed} | {f"navigator_{name}": value for name, value in other.items()} | held(setting)
    )
