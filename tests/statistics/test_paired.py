"""Intervals, tests and power of paired differences, against scipy and against published analyses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copgen_fast.statistics.paired import (
    Interval,
    detectable_difference,
    difference,
    holm,
    sample,
    sign_flip_p,
    smallest_sign_flip_p,
    t_interval,
    t_p,
)

# Hours of sleep gained by two drugs, by patient: Student, "The probable error of a mean", Biometrika 6 (1908).
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
# Crossed minus self-fertilised maize by pair, in eighths of an inch: Darwin's, in Fisher, "The Design of Experiments"
# (1935), section 17.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

numbers = st.lists(st.integers(-50, 50), min_size=2, max_size=8)


def by_seed(values):
    return dict(enumerate(values))


def test_students_sleep_data():
    found = difference(by_seed(SLEEP[1]), by_seed(SLEEP[0]))
    assert found.mean == pytest.approx(1.58) and found.sd == pytest.approx(1.229995, abs=1e-6)
    # As R's help of t.test has it for these data: 95 % from 0.7001142 to 2.4598858.
    assert (found.interval.low, found.interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert found.n == 10 and not found.holds_zero and found.p is None
    assert t_p(list(found.values.values())) == pytest.approx(0.002832890, abs=1e-9)


def test_fishers_test_of_darwins_maize():
    # Section 21: of the 2^15 sums, 863 are as large as that observed, 314, and as many as small as its opposite.
    assert sign_flip_p(MAIZE) == 2 * 863 / 2**15
    interval = t_interval([x / 8 for x in MAIZE])
    assert (interval.low, interval.high) == pytest.approx((0.003899165, 5.229434169), abs=1e-8)


@settings(max_examples=30)
@given(numbers)
def test_intervals_are_scipys(values):
    if len(set(values)) > 1:
        peer = stats.ttest_1samp(values, 0)
        assert tuple(peer.confidence_interval(0.95)) == pytest.approx((t_interval(values).low, t_interval(values).high))
        assert t_p(values) == pytest.approx(peer.pvalue)
    else:
        assert t_interval(values) == Interval(values[0], values[0]) and t_p(values) == (values[0] == 0)


@settings(max_examples=30)
@given(numbers, st.randoms())
def test_a_sign_flip_test_looks_at_sizes_and_signs_alone(values, random):
    p = sign_flip_p(values)
    assert smallest_sign_flip_p(len(values)) <= p <= 1
    assert p * 2 ** len(values) == pytest.approx(round(p * 2 ** len(values)))
    shuffled = random.sample(values, len(values))
    assert p == sign_flip_p(shuffled) == sign_flip_p([-3 * x for x in values])
    sums = [
        abs(sum(np.array(values) * flips))
        for flips in np.stack(np.meshgrid(*[[1, -1]] * len(values)), -1).reshape(-1, len(values))
    ]
    assert p == pytest.approx(min(1, np.mean(np.array(sums) >= abs(sum(values)))))


@pytest.mark.parametrize(("n", "p"), [(3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_so_many_seeds_can_not_give_a_smaller_p(n, p):
    assert sign_flip_p([1.0 + i for i in range(n)]) == smallest_sign_flip_p(n) == p


def test_more_pairs_than_can_be_enumerated_are_drawn():
    values = np.random.default_rng(0).normal(0.4, 1, 20)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


@settings(max_examples=30)
@given(
    st.dictionaries(st.integers(0, 9), st.integers(-9, 9), min_size=1),
    st.dictionaries(st.integers(0, 9), st.integers(-9, 9), min_size=1),
)
def test_differences_are_of_common_seeds_and_change_sign_with_their_order(one, other):
    found, back = difference(one, other, tested=True), difference(other, one, tested=True)
    common = one.keys() & other.keys()
    if not common:
        assert found is back is None
        return
    assert found.values.keys() == common and found.mean == pytest.approx(-back.mean)
    assert (found.sd, found.p, found.detectable) == pytest.approx((back.sd, back.p, back.detectable))
    shift = {seed: 7 * seed for seed in range(10)}  # what a seed does to both is no difference
    moved = [{seed: x + shift[seed] for seed, x in values.items()} for values in (one, other)]
    assert difference(*moved, tested=True) == found


def test_one_seed_has_no_interval_and_no_test():
    found = difference({0: 0.5, 1: 0.25}, {1: 0.5}, tested=True)
    assert (found.mean, found.values) == (-0.25, {1: -0.25})
    assert found.sd is found.interval is found.p is found.t_p is found.detectable is None and found.holds_zero
    assert sample({3: 0.5}).sd is sample({3: 0.5}).interval is None


def test_holms_adjustment_of_published_examples():
    # The manual of pingouin (Vallat 2018), function `multicomp`.
    given, expected = [0.5, 0.003, 0.32, 0.054, 0.0003], [0.64, 0.012, 0.64, 0.162, 0.0015]
    assert list(map(holm(by_seed(given)).get, range(5))) == pytest.approx(expected)
    # Endpoints of a trial in Benjamini & Hochberg (1995), section 3.2: three stand at 0.05.
    trial = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.324,
        0.4262,
        0.5719,
        0.6528,
        0.759,
        1,
    ]
    adjusted = holm(by_seed(trial))
    assert [adjusted[i] <= 0.05 for i in range(15)] == [True] * 3 + [False] * 12
    assert holm({}) == {}


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(values):
    p_values = by_seed(values)
    adjusted = holm(p_values)
    assert adjusted == holm(dict(reversed(p_values.items())))
    ranked = sorted(p_values, key=p_values.get)
    assert [adjusted[name] for name in ranked] == sorted(adjusted.values())
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1, len(p_values) * p)
    assert adjusted[ranked[0]] == min(1, len(p_values) * p_values[ranked[0]])


# Effect size, pairs and power of two-sided paired t tests at 0.05: the manual of G*Power 3 (Faul et al. 2007), after an
# example of Cohen's; and R's package pwr (Champely 2020), which gives n 14.30276 for 0.8.
@pytest.mark.parametrize(
    ("effect", "n", "power"), [(0.421637, 50, 0.832114), (0.8, 14.30276, 0.8), (0.5, 33.36713, 0.8)]
)
def test_detectable_differences_are_those_of_power_tables(effect, n, power):
    assert detectable_difference(1.0, n, power=power) == pytest.approx(effect, rel=2e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 30])
def test_a_detectable_difference_is_found_with_that_power(n):
    found = detectable_difference(2.0, n)
    assert found == pytest.approx(2 * detectable_difference(1.0, n)) and found > detectable_difference(2.0, n + 1)
    draws = np.random.default_rng(0).normal(found, 2.0, (20_000, n))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.012)
    assert detectable_difference(2.0, 1) is None
