"""Displacements scaled to a distance: E||z' - z|| over the prior, measured on draws that are always the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from copgen_fast.errors import UsageError
from copgen_fast.options import Range, check_ranges

DRAWS = 4096
"""Draws by which E||z' - z|| is measured."""
PART = 256
"""Of them at once, where latents may be as large as images."""


@dataclass(frozen=True)
class Scaled:
    """Options of every way that moves z."""

    distance: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Scale all displacements so that E||z' - z|| is this; None: as they are."""

    def __post_init__(self) -> None:
        check_ranges(self)


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
