import threading

import pytest

from copgen_fast.pairs.read.prefetch import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_results_are_those_of_the_requested_steps(depth):
    prefetch = Prefetcher(lambda step: lambda: step * step, depth)
    steps = [0, 1, 2, 2, 3, 9, 10, 0, 1, 1, 1, 5]
    assert [prefetch(step) for step in steps] == [step * step for step in steps]


def test_following_steps_are_made_before_they_are_requested():
    made = {step: threading.Event() for step in range(10)}
    prefetch = Prefetcher(lambda step: made[step].set, 2)
    prefetch(0)
    assert made[1].wait(5) and made[2].wait(5)
    assert not made[4].is_set()
    prefetch(1)
    assert made[3].wait(5)


def test_work_is_planned_in_the_requesting_thread_in_order():
    planned = []

    def plan(step):
        planned.append((step, threading.current_thread()))
        return lambda: None

    prefetch = Prefetcher(plan, 2)
    for step in range(5):
        prefetch(step)
    assert planned == [(step, threading.current_thread()) for step in range(7)]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_when_its_step_is_requested_and_tried_again(kind, depth):
    fails = [True]

    def work(step):
        if step == 2 and fails.pop():
            fails.append(False)
            raise kind("gone for a moment")
        return step

    prefetch = Prefetcher(lambda step: lambda: work(step), depth)
    assert [prefetch(0), prefetch(1)] == [0, 1]
    with pytest.raises(kind):
        prefetch(2)
    fails[:] = [False] * 9
    assert [prefetch(2), prefetch(3), prefetch(4)] == [2, 3, 4]


@pytest.mark.parametrize("depth", [0, 2])
def test_nothing_is_made_beyond_the_end_unless_requested(depth):
    planned = []

    def plan(step):
        planned.append(step)
        return lambda: step

    prefetch = Prefetcher(plan, depth, end=4)
    assert [prefetch(step) for step in range(4)] == [0, 1, 2, 3]
    assert planned == [0, 1, 2, 3]
    assert [prefetch(4), prefetch(5), prefetch(2)] == [4, 5, 2]
    assert planned[4:] == ([4, 5, 2] if depth == 0 else [4, 5, 2, 3])
