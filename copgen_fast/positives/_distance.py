"""Displacements scaled to a distance: E||z' - z|| over the prior, measured on draws that are always the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from copgen_fast.errors import UsageError

DRAWS = 4096
"""Draws by which E||z' - z|| is measured."""
PART = 256
"""Of them at once, where latents may be as large as images."""


def scale_to(distance: float | None, way: str, displacements: Iterable[Tensor]) -> float:
    """The factor by which E||dz|| becomes `distance`; 1 without one, and then nothing is drawn.

    Args:
        way: its name, for the message.
        displacements: [n, L] each, `DRAWS` rows in all.

    Raises:
        UsageError: nothing moves, so that no factor does.
    """
    if distance is None:
        return 1.0
    mean = torch.cat([dz.double().norm(dim=1) for dz in displacements]).mean().item()
    if mean == 0:
        raise UsageError(f"positive.options {way}.distance: as it is set, {way} does not move z at all")
    return distance / mean
