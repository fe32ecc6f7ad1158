"""Shards compared as they are first read."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from copgen_fast.errors import CorruptArtifactError
from copgen_fast.runtime.first_reads import FirstReads


def test_each_shard_is_compared_once_by_all_threads_together():
    compared, started = [], threading.Barrier(4)

    def compare(number, data):
        compared.append((number, data))

    checks = FirstReads(compare)

    def read(thread):
        started.wait()
        for number in range(5):
            checks(number, b"data")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert sorted(compared) == [(number, b"data") for number in range(5)]


def test_an_altered_shard_is_an_error_every_time():
    def compare(number, data):
        raise CorruptArtifactError("altered")

    checks = FirstReads(compare)
    for _ in range(2):
        with pytest.raises(CorruptArtifactError):
            checks(0)


def test_ranks_share_out_what_all_of_them_read():
    compared = []
    ranks = [FirstReads(lambda number, data, rank=rank: compared.append((rank, number))) for rank in range(3)]
    for step in ([0, 4, 5], [5, 6], [0, 1, 2, 3, 4, 5, 6]):
        for rank, checks in enumerate(ranks):
            for number in checks.share(step, rank, 3):
                checks(number)
            for number in step:
                checks(number)  # as it reads them all
    assert sorted(compared) == sorted((number % 3, number) for number in range(7))


def test_nothing_is_compared_where_that_is_not_wanted():
    checks = pickle.loads(pickle.dumps(FirstReads(None)))
    checks(3)
