"""When a process goes missing the others end, soon and with a line that names it."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from copgen_fast.runtime import heartbeat
from copgen_fast.runtime.heartbeat import Heartbeat, LostRankError, session
from tests.helpers import missing_ranks, processes
from tests.helpers.missing_ranks import MISSING_AT, WAYS

SEEN = r"last heard of at .*"  # it signs twice a second
AT_STEP = f"the data of step {MISSING_AT} of"
SAID = {
    "killed": f"rank 1 gives no sign of life: {SEEN}",
    "paused": f"rank 1 gives no sign of life: {SEEN}",
    "hanging": f"rank 1 is still at {AT_STEP} hanging",
    "failing": "rank 1 stopped: ValueError: no such pair",
    # Rank 1's own watchdog may be the first to end.
    "stuck": f"stuck at step {MISSING_AT} of stuck: rank 1 (is still|stopped: stuck) at {AT_STEP} stuck",
    "absent": f"at the barrier, after 8 s: rank 1 is missing: last heard of at {AT_STEP} absent",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each rank 0 said, with the seconds in which all had ended."""
    folder = tmp_path_factory.mktemp("missing")
    ports = dict(zip(WAYS, processes.free_ports(len(WAYS)), strict=True))
    started = time.monotonic()
    child = processes.run(missing_ranks.main, folder, ports)
    said = {way: (folder / f"{way}.0").read_text() for way in WAYS}
    assert child.code == 0, (said, child.stderr)
    return said, time.monotonic() - started


@pytest.mark.parametrize("way", WAYS)
def test_the_rank_that_is_missing_is_named(ends, way):
    lines = [line for line in ends[0][way].replace("\r", "\n").splitlines() if line.startswith("copgen_fast:")]
    assert len(lines) == 1
    assert re.fullmatch(f"copgen_fast: rank 0: {SAID[way]}", lines[0])
    assert "Traceback" not in ends[0][way]


def test_nobody_waits_long(ends):
    assert ends[1] < 120, "seconds, on a busy machine; timeouts were 8"


class Store(dist.HashStore):
    """A store that says when a key is read, and when it was looked for."""

    def __init__(self):
        super().__init__()
        self.on_get = lambda key: None
        self.on_checked = lambda keys: None

    def get(self, key):
        self.on_get(key)
        return super().get(key)

    def check(self, keys):
        found = super().check(keys)
        self.on_checked(keys)
        return found


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def pair(store, monkeypatch):
    """The heartbeats of two ranks in one process."""
    monkeypatch.setattr(heartbeat, "BEAT_EVERY", 0.01)
    monkeypatch.setattr(heartbeat, "SILENCE", 1.0)
    both = [Heartbeat(store, rank, 2, timeout=0.3) for rank in range(2)]
    yield both
    for one in reversed(both):
        one.close()


def test_processes_that_are_started_again_have_another_name():
    store, names = dist.HashStore(), []
    store.set("hello/1", "of a process that is no more")
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            first, *others = pool.map(lambda rank: session(store, rank, 3, timeout=10), range(3))
        assert others == [first, first]
        names.append(first)
    assert names[0] != names[1]
    with pytest.raises(LostRankError, match=re.escape("missing ranks [1, 2]")):
        session(store, 0, 3, timeout=0.1)


def test_a_barrier_returns_messages_in_the_order_of_ranks(store, pair):
    with ThreadPoolExecutor(2) as pool:
        for number in range(4):
            for messages in pool.map(lambda one: one.barrier("here", f"{one.rank}'s {number}"), pair):  # noqa: B023
                assert messages == [f"0's {number}", f"1's {number}"]
    assert store.check(["barrier 3/0"]) and not store.check(["barrier 0/0"]), "old messages are deleted"


def test_a_rank_that_stops_after_a_barrier_was_at_it(store, pair):
    """It came just after the other had looked for it, and stopped before that looked for faults."""
    first, second = pair
    both = ["barrier 0/0", "barrier 0/1"]

    def come_and_stop(keys):
        if keys == both:
            store.on_checked = lambda keys: None
            second.barrier("the stop", "saved")
            second.failed("stopped at step 3")

    store.on_checked = come_and_stop
    assert first.barrier("the stop") == ["", "saved"]
    with pytest.raises(LostRankError, match="rank 1 stopped: stopped at step 3"):
        first.barrier("the end")


def test_a_rank_that_moves_is_waited_for(store, pair):
    first, second = pair
    shards = iter(range(1, 11))

    def move(key):
        if key == "beat/1" and (shard := next(shards, 0)):
            second.mark(f"shard {shard}")

    store.on_get = move
    started = time.monotonic()
    with pytest.raises(LostRankError, match=re.escape("rank 1 is missing: last heard of at shard 10")):
        first.barrier("the end of the pairs")
    assert time.monotonic() - started > 2 * first.timeout


def test_missing_ranks_are_behind_or_silent(pair):
    first, second = pair
    assert first.missing() == ""
    first.mark("step 1")
    assert first.missing() == "rank 1 is still at the start"
    second.close()
    assert first.missing() == "rank 1 gives no sign of life: last heard of at the start"


def test_the_last_barrier_waits_for_all_that_are_alive(store, pair):
    first, second = pair
    reads = iter(range(20))

    def end_late(key):
        if key == "beat/1" and next(reads, 0) == 19:
            second.barrier("the end")

    store.on_get = end_late
    first.barrier("the end", while_alive=True)
    assert next(reads, None) is None


def test_rank_0_leaves_last(store, pair, monkeypatch):
    """The store may be its process's, and the others may still read in it."""
    monkeypatch.setattr(heartbeat, "SILENCE", 60.0)
    first, second = pair
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(first.close)
        store.wait(["left/0"])
        assert not leaving.done()
        second.close()
        leaving.result(timeout=30)


def test_causes_come_before_what_others_lost(pair):
    first, second = pair
    second.failed("rank 0 gives no sign of life", cause=False)
    assert first.missing() == "rank 0 gives no sign of life"
    second.failed("the disk is full")
    assert first.missing() == "rank 1 stopped: the disk is full"
    with pytest.raises(LostRankError, match="rank 1 stopped: the disk is full"):
        first.barrier("the run folder")
