"""Groups of a latent: the parts of z that act on different layers of a generator (`Generator.latent_groups`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from copgen_fast.errors import UsageError


def expect(argument: str, latent_groups: Sequence[int], groups: Sequence[int], values: Sequence[float]) -> None:
    """Check which groups an option names, and its value for each.

    Args:
        argument: the option's name, for the message.
        latent_groups: sizes of the generator's groups; (): it has one.
        groups: their numbers; (): all.
        values: one for each of these, or none.

    Raises:
        UsageError: a group that there is not, or twice, or another number of values, or one below 0.
    """
    there = max(1, len(latent_groups))
    wrong = [group for group in groups if not 0 <= group < there or groups.count(group) > 1]
    if wrong:
        what = f"0 to {there - 1}, each once" if there > 1 else "only 0, as the generator has one latent group"
        raise UsageError(f"{argument}: expected latent groups {what}; got {wrong[0]}")
    if values and len(values) != (len(groups) or there):
        raise UsageError(f"{argument}: expected {len(groups) or there} numbers, one for each group; got {len(values)}")
    if bad := [value for value in values if not 0 <= value < math.inf]:
        raise UsageError(f"{argument}: expected numbers of zero or more, got {bad[0]}")


def by_group(
    latent_groups: Sequence[int], groups: Sequence[int], values: Sequence[float], default: float
) -> list[float]:
    """A number for each group: those of `values` (without any, `default`) for `groups`, 0 for the others."""
    chosen = groups or range(max(1, len(latent_groups)))
    found = [0.0] * max(1, len(latent_groups))
    for index, group in enumerate(chosen):
        found[group] = values[index] if values else default
    return found


def factors(
    latent_dim: int, latent_groups: Sequence[int], groups: Sequence[int], scales: Sequence[float] = ()
) -> Tensor | None:
    """What each coordinate of a displacement is multiplied by, [L]; None where all of it stays as it is."""
    if not groups and not scales:
        return None
    numbers = torch.tensor(by_group(latent_groups, groups, scales, 1.0))
    return numbers.repeat_interleave(torch.tensor(latent_groups or (latent_dim,)))


def energy(w: Tensor, latent_groups: Sequence[int]) -> list[float]:
    """Share of each group in the squared norm of a vector [L]; zeros for a vector of zeros."""
    parts = w.split(list(latent_groups or (len(w),)))
    return [(part.square().sum() / w.square().sum().clamp_min(1e-30)).item() for part in parts]
