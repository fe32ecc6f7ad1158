import pytest
import torch
from torch.utils.data import DataLoader

from copgen_fast.errors import UsageError
from copgen_fast.images.real_pairs import RealPairs
from copgen_fast.images.split import ArraySplit
from copgen_fast.images.views import Centre
from copgen_fast.pairs.read import dali, iterable
from copgen_fast.pairs.read.iterable import PairIterable
from copgen_fast.pairs.read.loader import PairBatches, PairDataset, Sampler
from tests.helpers.pairs_fixtures import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write(folder)
    return folder


@pytest.fixture(
    params=["plain", pytest.param("dali", marks=pytest.mark.skipif(not dali.available(), reason="no DALI"))]
)
def make(request, folder):
    return lambda batch=3, **options: PairIterable(folder, batch, loader=request.param, **options)


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_epochs_are_those_of_the_pretrain_stage(make, folder):
    batches = PairBatches(PairDataset(folder), Sampler(10, 3, 0))
    pairs = make()
    assert len(pairs) == 3
    for epoch in range(3):
        assert (pairs.epoch, pairs.position) == (epoch, 0)
        found = list(pairs)
        assert all(same(batch, batches(3 * epoch + i)) for i, batch in enumerate(found)) and len(found) == 3


@pytest.mark.parametrize("stop", range(8))
def test_a_resume_of_a_resume_goes_on_exactly(make, stop):
    def rest(pairs, epochs=3):
        for _ in range(pairs.epoch, epochs):
            for batch in pairs:
                yield batch, pairs.state_dict()

    whole = [batch for batch, _ in rest(make())]
    state, seen = make().state_dict(), []
    for part in (stop, 1, 99):
        pairs = make()
        pairs.load_state_dict(state)
        for _, (batch, now) in zip(range(part), rest(pairs), strict=False):
            seen.append(batch)
            state = now
    assert len(seen) == len(whole) == 9
    assert all(same(one, other) for one, other in zip(seen, whole, strict=True))


def test_an_iteration_that_was_left_continues_and_set_epoch_starts_another(make):
    pairs = make()
    first = next(iter(pairs))
    assert (pairs.epoch, pairs.position) == (0, 1)
    pairs.set_epoch(0)
    assert len(list(pairs)) == 2 and pairs.epoch == 1
    pairs.set_epoch(0)
    assert same(next(iter(pairs)), first)


def test_ranks_share_batches_and_a_state_may_go_to_another_number_of_them(make):
    single = list(make(4))
    ranks = [make(4, rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        next(iter(rank))
    resumed = make(4)
    resumed.load_state_dict(ranks[0].state_dict())
    assert same(next(iter(resumed)), single[1])
    parts = [next(iter(rank)) for rank in ranks]
    assert same([torch.cat(part) for part in zip(*parts, strict=True)], single[1])


def test_a_state_of_another_order_is_refused(make):
    for other in (make(2), make(seed=1), make(shuffle_shards=2)):
        with pytest.raises(UsageError, match="order would differ"):
            make().load_state_dict(other.state_dict())


def test_a_data_loader_may_wrap_it_without_workers(make, monkeypatch):
    pairs = make()
    found = list(DataLoader(pairs, batch_size=None))
    assert len(found) == 3 and torch.is_tensor(found[0].labels)
    monkeypatch.setattr(iterable, "get_worker_info", object)  # as in a worker process
    with pytest.raises(UsageError, match="num_workers=0"):
        next(iter(pairs))


def test_any_data_set_of_pairs_will_do():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    real = RealPairs(ArraySplit(5, None, lambda size: images), Centre(2))
    found = [batch.anchors[:, 0, 0, 0] for batch in PairIterable(real, 2, cache_gib=1.0)]
    assert len(set(torch.cat(found).tolist())) == 4
