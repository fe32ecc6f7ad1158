"""The bootstrap over test images: against scipy's, and what it must not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copgen_fast.statistics.images import bootstrap


def drawn(seeds=4, count=300, better=0.1, seed=0):
    """Differences of encoders that get an image right alone with some chance, alike for each seed."""
    rng = np.random.default_rng(seed)
    return rng.choice([1, -1, 0], size=(seeds, count), p=[0.1 + better, 0.1, 0.8 - better]).astype(np.int8)


def test_intervals_over_images_are_scipys():
    differences = drawn()
    found = bootstrap(differences)
    peer = stats.bootstrap((differences.mean(0),), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert (found.images.low, found.images.high) == pytest.approx(tuple(peer.confidence_interval), abs=0.003)
    assert found.count == 300 and differences.mean() in found.images


def test_intervals_over_both_are_those_of_a_literal_loop():
    differences, rng = drawn(better=0.2) * np.array([[1], [1], [0], [0]], dtype=np.int8), np.random.default_rng(1)
    means = [
        differences[rng.integers(0, 4, 4)][:, rng.integers(0, 300, 300)].mean()  # the same images for all its seeds
        for _ in range(6000)
    ]
    found = bootstrap(differences)
    assert (found.both.low, found.both.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.006)
    assert found.both.low < found.images.low and found.both.high > found.images.high, "seeds differ, too"


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(2, 5))
def test_the_order_of_images_and_seeds_does_not_matter(seed, seeds):
    differences, rng = drawn(seeds, 40, seed=seed), np.random.default_rng(seed)
    found = bootstrap(differences, 200)
    assert bootstrap(differences[:, rng.permutation(40)], 200) == found
    other = bootstrap(differences[rng.permutation(seeds)], 200)
    assert other.images.low == pytest.approx(found.images.low, abs=0.1)


def test_equal_encoders_differ_on_no_images():
    found = bootstrap(np.zeros((3, 50), dtype=np.int8), 100)
    assert (found.images.low, found.images.high, found.both.low, found.both.high) == (0, 0, 0, 0)


def test_one_seed_says_nothing_of_others():
    assert bootstrap(drawn(seeds=1), 100).both is None


def test_more_seeds_narrow_the_interval_of_both():
    widths = [(found := bootstrap(drawn(seeds, 2000), 2000).both).high - found.low for seeds in (2, 8)]
    assert widths[1] < widths[0]
