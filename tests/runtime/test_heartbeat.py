"""When a process goes missing the others end, soon and with a line that names it."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from copgen_fast.runtime.heartbeat import Heartbeat, LostRankError, session
from tests.helpers.missing_ranks import MISSING_AT, WAYS
from tests.runtime.test_distributed import free_ports

ROOT = Path(__file__).parents[2]
SEEN = r"last heard of at .*"  # it signs twice a second
AT_STEP = f"the data of step {MISSING_AT} of"
SAID = {
    "killed": f"rank 1 gives no sign of life: {SEEN}",
    "paused": f"rank 1 gives no sign of life: {SEEN}",
    "hanging": f"rank 1 is still at {AT_STEP} hanging",
    "failing": "rank 1 stopped: ValueError: no such pair",
    "stuck": f"stuck at step {MISSING_AT} of stuck: rank 1 is still at {AT_STEP} stuck",
    "absent": f"at the meeting, after 8 s: rank 1 is missing: last heard of at {AT_STEP} absent",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each rank 0 said, with the seconds in which all had ended."""
    folder = tmp_path_factory.mktemp("missing")
    ports = free_ports(len(WAYS))
    ways = (f"{way}={port}" for way, port in zip(WAYS, ports, strict=True))
    command = [sys.executable, "-m", "tests.helpers.missing_ranks", str(folder), *ways]
    started = time.monotonic()
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    said = {way: (folder / f"{way}.0").read_text() for way in WAYS}
    assert child.returncode == 0, said
    return said, time.monotonic() - started


@pytest.mark.parametrize("way", WAYS)
def test_the_rank_that_is_missing_is_named(ends, way):
    lines = [line for line in ends[0][way].replace("\r", "\n").splitlines() if line.startswith("copgen_fast:")]
    assert len(lines) == 1
    assert re.fullmatch(f"copgen_fast: rank 0: {SAID[way]}", lines[0])
    assert "Traceback" not in ends[0][way]


def test_nobody_waits_long(ends):
    assert ends[1] < 120, "seconds, on a busy machine; timeouts were 8"


@pytest.fixture
def calls():
    """Two processes' parts of a roll call, in one process."""
    store = dist.HashStore()
    both = [Heartbeat(store, rank, 2, timeout=0.3) for rank in range(2)]
    yield both
    for call in both:
        call.close()


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


def test_words_are_exchanged_in_the_order_of_ranks(calls):
    first, second = calls
    for number in range(4):
        first._store.set(f"meeting {number}/1", f"second's {number}")
        assert first.barrier("here", f"first's {number}") == [f"first's {number}", f"second's {number}"]
    assert not first._store.check(["meeting 0/0"]), "old words are swept up"


def test_whoever_moves_is_waited_for(calls):
    first, second = calls
    position = first._position
    shards = iter(range(1, 11))

    def moving(rank):
        if shard := next(shards, 0):
            second.mark(f"shard {shard}")
            second._sign()
        return position(rank)

    first._position = moving
    started = time.monotonic()
    with pytest.raises(LostRankError, match=re.escape("rank 1 is missing: last heard of at shard 10")):
        first.barrier("the end of the pairs")
    assert time.monotonic() - started > 2 * first.timeout


def test_causes_come_before_what_others_lost(calls):
    first, second = calls
    second.failed("rank 0 gives no sign of life", cause=False)
    assert first._faults() == "rank 0 gives no sign of life"
    second.failed("the disk is full")
    assert first._faults() == "rank 1 stopped: the disk is full"
    with pytest.raises(LostRankError, match="rank 1 stopped: the disk is full"):
        first.barrier("the run folder")
