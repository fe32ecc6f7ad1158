"""Bootstrap over test images, kept apart from seeds: how far a difference depends on which images were tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copgen_fast.statistics.paired import LEVEL, Interval

_BLOCK = 500  # resamples at once, which bounds memory


@dataclass(frozen=True)
class ImageIntervals:
    """Bootstrap intervals of a difference in accuracy.

    Attributes:
        count: test images.
        images: for these encoders, over other test images: seeds averaged, images resampled.
        both: for other seeds and other images: seeds resampled, then images; None for one seed. With few seeds it is
            too narrow, of S seeds by about sqrt((S - 1) / S).
    """

    count: int
    images: Interval
    both: Interval | None


def bootstrap(differences: np.ndarray, resamples: int = 5_000) -> ImageIntervals:
    """Percentile intervals (Efron & Tibshirani 1993, chapter 13) of the mean of paired differences.

    The second one resamples both levels (Davison & Hinkley 1997, section 3.8): all seeds are tested on the same images,
    so a resample takes the same images for each of its seeds.

    Args:
        differences: for each seed and image, 1 where only the setting was right, -1 where only the baseline was, else
            0: int8 [S, N].
    """
    seeds, count = differences.shape
    # Images that all seeds treat alike are the same to a resample, which so needs their numbers alone.
    patterns, times = np.unique(differences.T, axis=0, return_counts=True)
    rng, images, both = np.random.default_rng(0), [], []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        of_seeds = rng.multinomial(count, times / count, size) @ patterns / count
        images.append(of_seeds.mean(1))
        both.append((of_seeds * rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)).sum(1) / seeds)
    return ImageIntervals(count, _percentiles(images), _percentiles(both) if seeds > 1 else None)


def _percentiles(means: list[np.ndarray]) -> Interval:
    low, high = np.percentile(np.concatenate(means), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high))
