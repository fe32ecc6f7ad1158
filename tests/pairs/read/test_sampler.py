import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.pairs.read.sampler import CoverageCheck, Sampler, permutation, windows

COUNTS = st.integers(1, 60)


@settings(deadline=None)
@given(COUNTS, st.integers(0, 5), st.integers(0, 2**40))
def test_the_permutation_depends_on_epoch_and_seed(count, epoch, seed):
    found = permutation(count, epoch, seed)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(count))
    assert torch.equal(found, permutation(count, epoch, seed))
    if count > 20:
        assert not torch.equal(found, permutation(count, epoch + 1, seed))
        assert not torch.equal(found, permutation(count, epoch, seed + 1))


@settings(deadline=None)
@given(COUNTS, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_a_window_shuffles_whole_shards_together(count, shard_size, window, epoch, seed):
    found = permutation(count, epoch, seed, shard_size, window).tolist()
    assert sorted(found) == list(range(count))
    groups = windows(count, epoch, seed, shard_size, window)
    assert [len(group) for group in groups[:-1]] == [window] * (len(groups) - 1)
    start = 0
    for group in groups:
        pairs = [i for shard in group for i in range(shard * shard_size, min(count, (shard + 1) * shard_size))]
        assert sorted(found[start : start + len(pairs)]) == sorted(pairs)
        start += len(pairs)


def test_windows_differ_by_epoch_and_seed_and_are_not_left_in_order():
    epochs = [permutation(40, epoch, seed, 5, 2).tolist() for epoch in range(3) for seed in range(2)]
    assert len({tuple(found) for found in epochs}) == 6
    first = [found[:10] for found in epochs]
    assert all(found != sorted(found) for found in first)
    assert len({min(found) // 5 for found in first}) > 1, "shards come in random order"


@settings(deadline=None)
@given(COUNTS, st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.sampled_from([None, 1, 2, 3]), st.integers(0, 9))
def test_ranks_together_see_the_single_process_batches(count, world, rows, window, seed):
    batch = world * rows
    assume(batch <= count)
    single = Sampler(count, batch, seed, shard_size=7, window=window)
    ranks = [Sampler(count, batch, seed, rank, world, 7, window) for rank in range(world)]
    for step in range(2 * single.steps_per_epoch + 1):
        assert sum((rank.indices(step) for rank in ranks), []) == single.indices(step)
        assert all(len(rank.indices(step)) == rank.rows for rank in ranks)


@settings(deadline=None, max_examples=50)
@given(COUNTS, st.integers(1, 9), st.integers(1, 7), st.integers(1, 4))
def test_loaded_shards_cover_the_batch_and_reach_one_window_further(count, batch, shard_size, window):
    batch = min(batch, count)
    sampler = Sampler(count, batch, 0, shard_size=shard_size, window=window)
    for step in range(3 * sampler.steps_per_epoch):
        loaded = sampler.shards(step)
        assert len(loaded) == len(set(loaded))
        needed = {index // shard_size for index in sampler.indices(step)}
        epoch, position = divmod(step, sampler.steps_per_epoch)
        groups = windows(count, epoch, 0, shard_size, window)
        touched = [number for number, group in enumerate(groups) if needed & set(group)]
        following = [*groups, windows(count, epoch + 1, 0, shard_size, window)[0]][touched[-1] + 1]
        assert set(loaded) == {shard for number in touched for shard in groups[number]} | set(following)
        assert loaded[0] in groups[touched[0]], "what is needed first is read first"


def test_bad_arguments_are_named():
    for batch in (0, 5):
        with pytest.raises(UsageError, match="4 pairs don't fill a batch"):
            Sampler(4, batch, 0)
    with pytest.raises(UsageError, match="batch of 4 pairs can't be shared equally by 3 processes"):
        Sampler(8, 4, 0, world=3)
    with pytest.raises(UsageError, match="rank: expected 0 .. 1, got 2"):
        Sampler(8, 4, 0, rank=2, world=2)
    for shard_size, window in ((None, 1), (4, 0)):
        with pytest.raises(UsageError, match=f"window of {window} shards"):
            Sampler(8, 4, 0, shard_size=shard_size, window=window)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_coverage_accepts_the_batches_of_a_sampler(rank, start):
    sampler = Sampler(23, 4, 0, rank, 2)
    coverage = CoverageCheck(sampler)
    for step in (*range(start, 17), 2, 3, 4, 5, 6, 1):
        coverage.record(step, sampler.indices(step))


def test_coverage_rejects_pairs_that_come_twice():
    sampler = Sampler(12, 4, 0)
    coverage = CoverageCheck(sampler)
    coverage.record(0, sampler.indices(0))
    with pytest.raises(CopgenError, match="twice in epoch 0, at step 1"):
        coverage.record(1, [*sampler.indices(1)[:3], sampler.indices(0)[2]])
    with pytest.raises(CopgenError, match="twice in epoch 1, at step 3"):
        CoverageCheck(sampler).record(3, [5, 6, 5, 7])
    with pytest.raises(CopgenError, match="twice in epoch 1, at step 4"):
        CoverageCheck(sampler).record(4, sampler.indices(3))  # another process had step 3


def test_coverage_rejects_an_epoch_that_lacks_pairs():
    sampler = Sampler(12, 4, 0)
    coverage = CoverageCheck(sampler)
    coverage.record(0, sampler.indices(0))
    coverage.record(1, sampler.indices(1)[:3])
    with pytest.raises(CopgenError, match="11 of 12 pairs in epoch 0"):
        coverage.record(2, sampler.indices(2))
