"""z' = z: both views show the same image, so that only data augmentation tells them apart (T_z = None)."""

from __future__ import annotations

from copgen_fast.positives import PositiveFunction, Setting


def build(setting: Setting) -> PositiveFunction:
    return lambda z, seeds: z.clone()  # z and z' are stored side by side
