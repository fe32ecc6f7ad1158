"""Interleaved timing, with a clock that only calls advance; no time is asserted."""

import gc

import pytest
import torch

from bench import harness
from bench.harness import Timing, interleaved, ratio_interval
from copgen_fast.errors import CopgenError


class FakeClock:
    """Time that passes only when `spend` says so."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def spend(self, name, durations):
        durations = iter(durations)

        def call():
            self.log.append(name)
            self.now += next(durations)

        return call


def test_candidates_alternate_and_medians_are_of_their_own_samples(monkeypatch):
    clock = FakeClock(monkeypatch)
    # Two calls to warm up, then the samples.
    a = clock.spend("a", [9, 0.1, *(0.1, 0.2, 0.3, 0.4, 5.0)])
    b = clock.spend("b", [9, 0.2, *(0.2,) * 5])
    times = interleaved({"a": a, "b": b}, 5, 0.01, least=5)
    assert clock.log == ["a", "a", "b", "b", *"ab", *"ba", *"ab", *"ba", *"ab"]
    assert times["a"].ms == pytest.approx(300)
    assert times["a"].spread == pytest.approx(1.32 / 0.18)  # interpolated between 0.4 and 5, and 0.1 and 0.2
    assert (times["b"].ms, times["b"].spread) == (pytest.approx(200), pytest.approx(1))


def test_quick_calls_fill_a_sample_and_slow_ones_sit_out(monkeypatch):
    clock = FakeClock(monkeypatch)
    quick = clock.spend("quick", iter(lambda: 0.001, None))
    slow = clock.spend("slow", iter(lambda: 1.0, None))
    times = interleaved({"quick": quick, "slow": slow}, 20, 0.01)
    assert (times["quick"].n, times["slow"].n) == (20, 7)
    assert clock.log.count("quick") == 2 + 20 * 10
    assert clock.log.count("slow") == 2 + 7
    first, last = (i for i in (clock.log.index("slow", 5), len(clock.log) - 1 - clock.log[::-1].index("slow")))
    assert last - first > 100, "the slow samples are spread over the rounds"


def test_more_seconds_give_a_slow_call_more_samples(monkeypatch):
    slow = FakeClock(monkeypatch).spend("slow", iter(lambda: 1.0, None))
    assert interleaved({"slow": slow}, 20, 0.01, sampling_seconds=12)["slow"].n == 12


def test_the_interval_of_a_ratio_draws_whole_rounds():
    drifting = tuple(1.0 + i for i in range(9))
    ours = Timing(5.0, 1.0, 9, drifting)
    same_rounds = Timing(10.0, 1.0, 9, tuple(2 * s for s in drifting))
    assert ratio_interval(ours, same_rounds) == (2, 2), "what slows a round down, slows both"
    low, high = ratio_interval(ours, Timing(10.0, 1.0, 8, same_rounds.seconds[:8]))
    assert low < 1.5 and high > 2.5, "unequal numbers are drawn apart"


def test_one_slow_warm_up_is_enough_and_fewer_samples_can_be_set(monkeypatch):
    clock = FakeClock(monkeypatch)
    step = clock.spend("step", [11, 2, 3, 4])
    assert interleaved({"step": step}, 30, 0.01, least=3)["step"] == Timing(3000, pytest.approx(3.6 / 2.4), 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), CopgenError("refused")])
def test_what_does_not_fit_or_refuses_is_left_out_with_a_line(capsys, error):
    def fails():
        raise error

    times = interleaved({"a": lambda: None, "too large": fails}, 5, 0)
    assert set(times) == {"a"}
    said = capsys.readouterr().out
    assert "left out: too large" in said and "Tried" not in said


def test_garbage_collection_is_off_only_while_timing():
    seen = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, 5, 0)
    assert not any(seen[2:])
    assert gc.isenabled()
