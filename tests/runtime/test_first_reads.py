"""Shards compared as they are first read, once, and again once they have changed."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from copgen_fast.errors import CopgenError, CorruptArtifactError
from copgen_fast.runtime.first_reads import FirstReads
from tests.helpers import processes
from tests.helpers.altered_files import alter


@pytest.fixture
def shards(tmp_path):
    """Seven files of 100 bytes each, and a name for the digest of each."""
    for number in range(7):
        (tmp_path / str(number)).write_bytes(bytes([number] * 100))
    return [(str(tmp_path / str(number)), f"digest {number}") for number in range(7)]


class Compared:
    """What a reader's shards are compared by: their bytes, which are all alike; the numbers are kept."""

    def __init__(self, shards):
        self.shards, self.numbers = shards, []

    def __call__(self, number, data):
        self.numbers.append(number)
        path = self.shards[number][0]
        if not os.path.exists(path):
            raise CopgenError(f"{number} is missing")
        with open(path, "rb") as file:
            if (data or file.read()) != bytes([number] * 100):
                raise CorruptArtifactError(f"{number} is altered")


def reader(shards, **options):
    compared = Compared(shards)
    return FirstReads(shards, compared, **options), compared.numbers


def test_each_shard_is_compared_once_by_all_threads_together(shards):
    checks, compared = reader(shards)
    started = threading.Barrier(4)

    def read(thread):
        started.wait()
        return [checks.read(number, 10, 5) for number in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, range(4)):
            assert found == [bytes([number] * 5) for number in range(5)]
    assert sorted(compared) == [0, 1, 2, 3, 4]


def test_readers_of_the_same_files_compare_them_once_together(shards):
    (one, first), (other, second) = reader(shards), reader(shards)
    assert one.read(0) == other.read(0) == bytes(100)
    other.expect(0)
    other.compare(0)
    assert (first, second) == ([0], [])
    elsewhere, third = reader([(path, "another digest") for path, _ in shards])
    elsewhere.read(0)
    assert third == [0], "what another index says of the file is another matter"


def test_an_altered_shard_is_an_error_every_time(shards):
    alter(shards[0][0], b"x" * 100)
    checks, compared = reader(shards)
    for act in (lambda: checks.read(0, 0, 1), lambda: checks.read(0), lambda: checks.expect(0)):
        with pytest.raises(CorruptArtifactError, match="0 is altered"):
            act()
    assert compared == [0, 0, 0]


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: alter(path, b"x" * 100), "altered"),
        (lambda path: alter(path, bytes(99)), "altered"),
        (lambda path: os.truncate(path, 99), "altered"),
        (os.unlink, "missing"),
    ],
    ids=["altered", "written shorter", "truncated", "removed"],
)
def test_what_changes_after_it_was_read_is_found_at_the_next_read(shards, harm, message, whole, trusting):
    checks, _ = reader(shards, trusting=trusting)
    size = {} if whole else {"offset": 0, "size": 1}
    assert checks.read(0, **size)[0] == 0
    harm(shards[0][0])
    for _ in range(2):
        with pytest.raises(CopgenError, match=f"0 is {message}"):
            checks.read(0, **size)


@pytest.mark.parametrize("whole", [False, True])
def test_the_same_bytes_written_again_are_compared_and_read_on(shards, whole):
    checks, compared = reader(shards)
    size = {} if whole else {"offset": 0, "size": 100}
    checks.read(0, **size)
    alter(shards[0][0], bytes(100))
    assert checks.read(0, **size) == checks.read(0, **size) == bytes(100)
    assert compared == [0, 0]


def test_a_reader_that_trusts_compares_only_what_changes(shards):
    checks, compared = reader(shards, trusting=True)
    alter(shards[0][0], b"x" * 100)  # before it is first read
    assert checks.read(0) == b"x" * 100 and not compared
    strict, found = reader(shards)
    with pytest.raises(CorruptArtifactError):
        strict.read(0)
    assert found == [0], "nobody else trusts it for that"


def test_ranks_share_out_what_all_of_them_read(shards):
    ranks = [reader(shards) for _ in range(3)]
    for step in ([0, 4, 5], [5, 6], [0, 1, 2, 3, 4, 5, 6]):
        for rank, (checks, _) in enumerate(ranks):
            for number in checks.share(step, rank, 3):
                checks.compare(number)
        for checks, _ in ranks:
            for number in step:
                checks.expect(number)
                checks.read(number, 0, 1)  # as it reads them all
    assert [sorted(numbers) for _, numbers in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    alter(shards[1][0], b"x" * 100)
    with pytest.raises(CorruptArtifactError):
        ranks[0][0].read(1, 0, 1)


def comparisons(checks, compared):
    """How many shards a process compares that reads two, as its exit code."""
    before = len(compared.numbers)
    assert checks.read(3, 0, 2) == bytes([3, 3]) and checks.read(4) == bytes([4] * 100)
    return len(compared.numbers) - before


def test_processes_that_a_reader_is_sent_to_know_what_was_compared(shards):
    compared = Compared(shards)
    checks = FirstReads(shards, compared)
    checks.read(3)
    ended = processes.run(comparisons, checks, compared)
    assert (ended.code, ended.stderr) == (1, "")
    assert compared.numbers == [3]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_wait_for_a_thread_that_it_lacks(shards):
    comparing, done = threading.Event(), threading.Event()

    def compare(number, data):
        comparing.set()
        done.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(FirstReads(shards, compare).read, 0)
        comparing.wait()
        child = multiprocessing.get_context("fork").Process(target=lambda: reader(shards)[0].read(0))
        child.start()
        child.join(60)
        ended = child.exitcode
        child.kill()
        done.set()
    assert ended == 0
