"""Differences between two settings, paired by seed: interval, exact test, and what so many seeds could have shown."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
"""Confidence of every interval."""
_MOST_FLIPS = 2**16


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Sample:
    """One number over seeds.

    Attributes:
        values: by seed.
        mean: of them.
        sd: sample standard deviation, over n - 1; None for one seed.
        interval: Student's t interval of the mean; None for one seed.
    """

    values: Mapping[int, float]
    mean: float
    sd: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """The difference of one number between a setting and its baseline, paired by seed.

    Attributes:
        values: by seed, of the seeds that both have.
        mean, sd: of these; sd is None for one seed.
        interval: Student's t interval of the mean; None for one seed.
        detectable: the mean difference that so many seeds would have shown with 80 % power, at this sd.
        p: of the exact sign-flip test; None where it was not tested, or for one seed.
        p_holm: p, adjusted for all comparisons of the study.
        t_p, t_p_holm: the same of Student's paired t test, which takes differences for normal, as the interval does.
    """

    values: Mapping[int, float]
    mean: float
    sd: float | None
    interval: Interval | None
    detectable: float | None
    p: float | None = None
    p_holm: float | None = None
    t_p: float | None = None
    t_p_holm: float | None = None

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.values)

    @property
    def holds_zero(self) -> bool:
        """Whether no difference is among what the interval allows; so it is where there is no interval."""
        return self.interval is None or 0 in self.interval


def sample(values: Mapping[int, float]) -> Sample:
    """Mean, standard deviation and interval of one number's values by seed, at least one."""
    numbers = list(values.values())
    return Sample(dict(values), float(np.mean(numbers)), _sd(numbers), t_interval(numbers))


def difference(values: Mapping[int, float], baseline: Mapping[int, float], tested: bool = False) -> Difference | None:
    """`values` minus `baseline` over the seeds that both have; None where they have none in common.

    Args:
        tested: whether to compute `p` and `t_p`.
    """
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    paired = {seed: values[seed] - baseline[seed] for seed in seeds}
    numbers = list(paired.values())
    sd = _sd(numbers)
    shown = None if sd is None else detectable_difference(sd, len(numbers))
    found = Difference(paired, float(np.mean(numbers)), sd, t_interval(numbers), shown)
    return dataclasses.replace(found, p=sign_flip_p(numbers), t_p=t_p(numbers)) if tested else found


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean (Student 1908), which takes the values for normal; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, half = np.mean(values), stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return Interval(float(mean - half), float(mean + half))


def t_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of no difference by Student's paired t test (1908); None for fewer than two."""
    if len(differences) < 2:
        return None
    mean, error = abs(np.mean(differences)), stats.sem(differences)
    # Differences that are all the same have no error to compare with: they are 0, or surely not.
    return float(2 * stats.t.sf(mean / error, len(differences) - 1)) if error else float(mean == 0)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of no difference by Fisher's sign-flip test (1935, section 21); None for fewer than two.

    If the settings were equal, each difference would as soon have had the other sign: p is the share of all 2^n choices
    of signs whose mean is as far from 0. Exact up to 16 pairs, of as many random choices beyond.
    """
    if len(differences) < 2:
        return None
    test = stats.permutation_test(
        (np.asarray(differences),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_MOST_FLIPS,
        random_state=0,
    )
    return float(test.pvalue)


def smallest_sign_flip_p(n: int) -> float:
    """The smallest p that the sign-flip test of n pairs can give: where all differences have the same sign."""
    return 2 / 2**n


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for testing them all (Holm 1979): the chance of any false finding stays below the level.

    The smallest of m is multiplied by m, the next one by m - 1 and so on; none is less than one before it, or above 1.
    """
    names = sorted(p_values, key=p_values.__getitem__)
    factors = np.arange(len(names), 0, -1)
    adjusted = np.maximum.accumulate(factors * np.array([p_values[name] for name in names])).clip(max=1)
    return dict(zip(names, adjusted.tolist(), strict=True))


def detectable_difference(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The mean difference that a two-sided t test of n pairs finds with probability `power`; None for fewer than two.

    By the noncentral t distribution (Cohen 1988, section 2.3; what finds the wrong direction is not counted).

    Args:
        sd: of the paired differences.
        alpha: level of the test.
    """
    return None if n < 2 else sd * _noncentrality(n, alpha, power) / math.sqrt(n)


@functools.cache
def _noncentrality(n: int, alpha: float, power: float) -> float:
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    return optimize.brentq(lambda shift: stats.nct.sf(critical, n - 1, shift) - power, 0, 4 * critical + 5)


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
