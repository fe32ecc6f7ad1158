"""Faults of shards, in every loader that is installed here."""

import dataclasses
import os
import struct
import warnings

import pytest
import torch

from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError
from copgen_fast.pairs.format import member_table, read_index
from copgen_fast.pairs.read import dali, dataset
from copgen_fast.pairs.read.loader import PairBatches, PairDataset, Sampler
from copgen_fast.pairs.read.reader import Reader
from tests.helpers import altered_files
from tests.helpers.pairs_fixtures import CONFIG, update_digest, write

needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
LOADERS = {
    "plain": lambda pairs, sampler, on_corrupt="stop": PairBatches(pairs, sampler, 0.0, 2, on_corrupt),
    "alone": lambda pairs, sampler, on_corrupt="stop": PairBatches(pairs, sampler, 0.0, 0, on_corrupt),
    "cached": lambda pairs, sampler, on_corrupt="stop": PairBatches(pairs, sampler, 1.0, 2, on_corrupt),
    "dali": lambda pairs, sampler, on_corrupt="stop": dali.DaliBatches(pairs, sampler, 2, on_corrupt),
}


@pytest.fixture(params=["plain", "alone", "cached", pytest.param("dali", marks=needs_dali)])
def loader(request):
    return LOADERS[request.param]


@pytest.fixture(params=["png", "jpeg", "raw"])
def folder(request, tmp_path):
    write(tmp_path, dataclasses.replace(CONFIG, codec=request.param))
    return tmp_path


@pytest.fixture
def png(tmp_path):
    write(tmp_path)
    return tmp_path


def spoil(folder, index, member, data=b"no image, nor JSON, nor anything else"):
    """Overwrite the start of a member in a shard, and have the index agree."""
    number, row = divmod(index, CONFIG.shard_size)
    path = folder / f"shard-{number:06d}.tar"
    shard = read_index(folder).shards[number]
    offset = int(member_table(path, shard.first, shard.count, read_index(folder).codec)[row, member, 0])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    update_digest(folder, path.name, "")


def all_batches(batches, start=0, steps=7):
    return [batches(step) for step in range(start, start + steps)]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def expected(folder, sampler, steps, replace):
    """Batches by hand: `replace` says which pair comes in place of which."""
    pairs = PairDataset(folder)
    for step in steps:
        found = [pairs[replace.get(index, index)] for index in sampler.indices(step)]
        anchors, positives, labels = zip(*found, strict=True)
        yield torch.stack(anchors), torch.stack(positives), torch.tensor(labels)


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_corrupt_pair_stops_at_its_step_and_is_named(png, loader, member):
    spoil(png, 5, member)
    sampler = Sampler(10, 2, seed=3)
    bad = next(step for step in range(5) if 5 in sampler.indices(step))
    assert bad > 1, "else nothing is read ahead"
    batches = loader(PairDataset(png), sampler)
    sound = list(expected(png, sampler, range(bad), {}))
    assert all(same(batches(step), sound[step]) for step in range(bad))
    name = ("00000005.anchor.png", "00000005.positive.png", "00000005.json")[member]
    for _ in range(2):
        with pytest.raises(CorruptArtifactError, match=rf"shard-000001\.tar: {name} .*--pretrain\.on-corrupt skip"):
            batches(bad)
    later = next(step for step in range(bad + 1, 10) if 5 not in sampler.indices(step))
    assert same(batches(later), next(expected(png, sampler, [later], {})))


@pytest.mark.filterwarnings("ignore:corrupt pair")
def test_skipped_pairs_are_replaced_by_the_next_sound_ones(folder, loader):
    for index, member in ((4, 0), (5, 2), (9, 1)):
        # Raw pixels are all valid: what a raw image can lack is its record.
        member = 2 if PairDataset(folder).index.codec == "raw" else member
        spoil(folder, index, member)
    sampler = Sampler(10, 4, seed=0)
    wanted = list(expected(folder, sampler, range(7), {4: 6, 5: 6, 9: 0}))
    batches = loader(PairDataset(folder), sampler, "skip")
    assert all(same(one, other) for one, other in zip(all_batches(batches), wanted, strict=True))
    assert batches.skipped == [4, 5, 9]
    for start in (3, 5, 1):  # a resume, a resume of it, and a step back: each in a process that knows nothing yet
        resumed = loader(PairDataset(folder), sampler, "skip")
        assert all(same(one, other) for one, other in zip(all_batches(resumed, start, 2), wanted[start:], strict=False))


def test_each_skipped_pair_is_reported_once(png, loader):
    spoil(png, 7, 0)
    batches = loader(PairDataset(png), Sampler(10, 5, 0), "skip")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        all_batches(batches)
    about = [str(warning.message) for warning in told if "corrupt pair" in str(warning.message)]
    assert len(about) == 1 and "corrupt pair 7 skipped" in about[0] and "00000007.anchor.png" in about[0]


@pytest.mark.filterwarnings("ignore:corrupt pair")
def test_nothing_but_corrupt_pairs_is_an_error(png, loader):
    for index in range(10):
        spoil(png, index, 0)
    with pytest.raises(CorruptArtifactError, match="every pair is corrupt"):
        loader(PairDataset(png), Sampler(10, 2, 0), "skip")(0)


def test_an_image_of_another_size_is_corrupt(png, loader):
    small = write_small(png.parent / "small")
    spoil(png, 0, 0, small)
    sampler = Sampler(10, 2, seed=1)
    step = next(step for step in range(5) if 0 in sampler.indices(step))
    with pytest.raises(CorruptArtifactError, match=r"00000000\.anchor\.png is \[3, 4, 4\], the index says \[3, 8, 8\]"):
        loader(PairDataset(png), sampler)(step)


def write_small(path):
    """A PNG file of 4 x 4 pixels that is shorter than those of 8 x 8."""
    from copgen_fast.images.codecs import CODECS

    return CODECS["png"].encode(torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())


def test_a_record_of_another_pair_is_corrupt(png, loader):
    spoil(png, 2, 2, b'{"index": 8')
    batches = loader(PairDataset(png), Sampler(10, 10, 0))
    with pytest.raises(CorruptArtifactError, match=r"00000002\.json belongs to pair 8"):
        batches(0)


def test_a_shard_truncated_after_it_was_opened_is_named_and_never_skipped(png, loader):
    pairs = PairDataset(png)
    os.truncate(png / "shard-000001.tar", 900)
    for on_corrupt in ("stop", "skip"):
        with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar is truncated"):
            loader(pairs, Sampler(10, 10, 0), on_corrupt)(0)


def test_a_shard_gone_after_it_was_opened_does_not_hang(png, loader):
    pairs = PairDataset(png)
    (png / "shard-000001.tar").unlink()
    for window in (None, 2):
        with pytest.raises(UsageError, match=r"shard-000001\.tar"):
            loader(pairs, Sampler(10, 10, 0, shard_size=4, window=window), "skip")(0)


def test_files_that_the_index_does_not_list_are_refused(png):
    (png / "shard-000003.tar").write_bytes((png / "shard-000002.tar").read_bytes())
    with pytest.raises(UsageError, match=r"holds shard-000003\.tar, which index\.json does not list: remove it"):
        PairDataset(png)
    (png / "shard-000003.tar").unlink()
    (png / "shard-000001.tar").unlink()
    with pytest.raises(UsageError, match=r"shard-000001\.tar.*--stages pairs"):
        PairDataset(png)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_windows_read_whole_shards_one_after_the_other(png, loader, window, monkeypatch):
    sampler = Sampler(10, 3, 0, shard_size=4, window=window)
    read, opened = [], []
    whole, one = PairDataset.read_shard, PairDataset.read
    monkeypatch.setattr(PairDataset, "read_shard", lambda self, n: read.append(n) or whole(self, n))
    monkeypatch.setattr(
        PairDataset, "read", lambda self, i, shard=None: opened.append(shard is None) or one(self, i, shard)
    )
    wanted = list(expected(png, sampler, range(6), {}))
    opened.clear()
    batches = loader(PairDataset(png), sampler)
    assert all(same(batches(step), wanted[step]) for step in range(6))
    assert sum(opened) <= 1, "only the look at the first pair's size reads at random"
    assert read[: len(sampler.shards(0))] == sampler.shards(0), "what is needed first is read first"
    assert len(read) <= 3 * (1 if window == 3 else 4), "once an epoch, read ahead included"


def test_shards_that_are_no_longer_needed_are_released(png):
    reader = Reader(PairDataset(png), "stop")
    first = reader.load_shards([0, 1])
    second = reader.load_shards([1, 2])
    assert set(second) == {1, 2} and second[1] is first[1]
    assert reader.pair(5, second)[2] == 1


def test_a_shard_that_could_not_be_read_is_read_again(png):
    reader = Reader(PairDataset(png), "stop")
    moved = png / "shard-000000.tar"
    moved.rename(png / "elsewhere")
    shards = reader.load_shards([0])
    with pytest.raises(UsageError, match=r"shard-000000\.tar is missing: run `--stages pairs`"):
        shards[0].result()
    (png / "elsewhere").rename(moved)
    assert len(reader.load_shards([0])[0].result()) == moved.stat().st_size


def test_an_error_in_a_thread_is_raised_at_its_step(png, loader, monkeypatch):
    sampler = Sampler(10, 2, 0)
    batches = loader(PairDataset(png), sampler)
    monkeypatch.setattr(PairDataset, "read", lambda *arguments: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        batches(0)
    monkeypatch.undo()
    assert same(batches(0), next(expected(png, sampler, [0], {})))


def test_pairs_that_come_twice_are_noticed(png, loader):
    batches = loader(PairDataset(png), Sampler(10, 2, 0))
    batches.sampler.epoch(1)[8:] = batches.sampler.epoch(1)[:2].clone()
    all_batches(batches, 0, 9)
    with pytest.raises(CopgenError, match="a pair twice in epoch 1, at step 9"):
        batches(9)


@pytest.mark.parametrize("end", [1, 2, 4])
def test_nothing_is_prefetched_beyond_the_last_step(png, loader, end, monkeypatch):
    read, one = [], PairDataset.read
    sampler = Sampler(10, 2, 0, steps=end)
    wanted = list(expected(png, sampler, range(8), {}))
    batches = loader(PairDataset(png), sampler)
    monkeypatch.setattr(PairDataset, "read", lambda self, i, *rest: read.append(i) or one(self, i, *rest))
    assert all(same(batches(step), wanted[step]) for step in range(end))
    assert sorted(read) == sorted(sum((sampler.indices(step) for step in range(end)), []))
    assert all(same(batches(step), wanted[step]) for step in (end, end + 1, 0, 7)), (
        "what is requested comes all the same"
    )


@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_sizes_are_checked_before_another_decoder_takes_the_files(on_corrupt, png):
    """Encoded pairs are DALI's input, which would decode whatever a header claims."""
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 65_000, 65_000)
    spoil(png, 5, 1, header)
    reader = Reader(PairDataset(png), on_corrupt)
    if on_corrupt == "stop":
        with pytest.raises(CorruptArtifactError, match=r"00000005.positive.png is \[3, 65000, 65000\]"):
            reader.encoded(5, {})
    else:
        with pytest.warns(UserWarning, match="corrupt pair 5 skipped"):
            assert reader.encoded(5, {}).index == 6


@pytest.mark.parametrize("window", [None, 1])
def test_an_altered_shard_stops_the_first_step_that_reads_it(png, loader, window):
    """Whatever `on_corrupt` says, as no part of such a shard can be trusted; steps before it don't read it."""
    data = bytearray((png / "shard-000001.tar").read_bytes())
    data[600] ^= 1
    (png / "shard-000001.tar").write_bytes(data)
    sampler = Sampler(10, 2, 1, shard_size=4, window=window)
    batches = loader(PairDataset(png), sampler, "skip")
    for step in range(5):
        if any(index // 4 == 1 for index in sampler.indices(step)):
            with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar is altered"):
                batches(step)
            break
        batches(step)
    assert step < 4


@pytest.mark.parametrize("window", [None, 2])
def test_each_shard_is_hashed_once_by_all_ranks_together(png, loader, window, monkeypatch):
    hashed = []
    monkeypatch.setattr(dataset, "check_file", lambda path, *_: hashed.append(path.name))
    ranks = [loader(PairDataset(png), Sampler(10, 2, 0, rank, 2, 4, window)) for rank in (0, 1)]
    for step in range(10):
        for rank in ranks:
            rank(step)
    assert hashed.count("shard-000000.tar") <= 2, "each may read the first pair for its size"
    assert sorted(name for name in hashed if "000000" not in name) == ["shard-000001.tar", "shard-000002.tar"]


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("harm", altered_files.HARMS)
@pytest.mark.parametrize("loader", ["alone", pytest.param("dali", marks=needs_dali)])
def test_a_shard_that_changes_while_it_is_read_is_never_skipped(png, loader, harm, window):
    pairs, sampler = PairDataset(png), Sampler(10, 2, 0, shard_size=4, window=window)
    batches = LOADERS[loader](pairs, sampler, "skip")
    all_batches(batches, 0, 5)
    change, said = altered_files.HARMS[harm]
    change(png / "shard-000001.tar")
    with pytest.raises(CopgenError, match=rf"shard-000001\.tar.*{said}.*--stages pairs") as caught:
        all_batches(batches, 5, 10)
    assert "\n" not in str(caught.value) and not batches.skipped


def test_pairs_that_are_read_without_comparing_are_compared_once_they_change(png):
    pairs = PairDataset(png, check=False)
    altered_files.flip(png / "shard-000001.tar", 700)
    assert pairs.record(4)["index"] == 4
    altered_files.flip(png / "shard-000001.tar", 701)
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar is altered"):
        pairs.record(4)
