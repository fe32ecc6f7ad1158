import io

import pytest

from copgen_fast.runtime.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def lines(steps, total=12_288, initial=0, **values):
    """What is written by updates of (seconds, samples), one after the other."""
    stream, clock = io.StringIO(), Clock()
    with progress(total, "pretrain navigator", initial=initial, stream=stream, clock=clock) as bar:
        for seconds, samples in steps:
            clock.now += seconds
            bar.update(samples, **values)
    return stream.getvalue().splitlines()


def test_a_line_every_30_seconds_and_one_at_the_end():
    assert lines([(10, 2048)] * 5, loss=4.3) == [
        "pretrain navigator: 6,144/12,288 samples, 50 %, 205 samples/s, 30 s left, loss 4.3",
        "pretrain navigator: 10,240/12,288 samples, 83 %, 205 samples/s, 10 s left, loss 4.3",
    ]


def test_the_last_line_says_how_long_it_took():
    assert lines([(30, 12_288)]) == ["pretrain navigator: 12,288/12,288 samples, 100 %, 410 samples/s, in 30 s"]


def test_a_resumed_loop_counts_what_was_done_but_not_in_its_rate():
    assert lines([(10, 100)], total=1000, initial=500, data_wait="3 %") == [
        "pretrain navigator: 600/1,000 samples, 60 %, 10 samples/s, 40 s left, data_wait 3 %"
    ]


def test_a_finished_loop_writes_nothing():
    assert lines([], total=1000, initial=1000) == []


@pytest.mark.parametrize(
    ("left", "shown"), [(119, "119 s left"), (150, "2.5 min left"), (5400, "90 min left"), (36_000, "10 h left")]
)
def test_time_is_shown_in_the_unit_that_fits(left, shown):
    (line,) = lines([(1, 1)], total=1 + left)
    assert f", {shown}" in line


def test_a_terminal_has_one_bar_without_colours():
    stream = Terminal()
    with progress(4, "pairs", unit="images", stream=stream) as bar:
        bar.update(4, loss=4.3125)
    written = stream.getvalue()
    assert "\n" not in written.rstrip("\n") and "\x1b[3" not in written
    assert "pairs: 100%" in written and " images/s" in written and "loss=4.31" in written


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_it_is_silent_where_disabled(monkeypatch, stream, by):
    if by == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress(4, "pairs", disable=by == "argument", stream=stream) as bar:
        bar.update(4, loss=1.0)
    assert stream.getvalue() == ""
