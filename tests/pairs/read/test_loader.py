import dataclasses
import itertools
import multiprocessing
import os
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from copgen_fast.config import PretrainConfig
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.pairs.read.loader import PairBatch, PairBatches, PairDataset, Sampler, open_batches
from copgen_fast.pairs.read.sampler import permutation
from tests.helpers.pairs_fixtures import CONFIG, contents, forge, source, update_digest, write

NO_CACHE = 0.0


class Numbered(Dataset):
    """Pair i is filled with the bytes of i; anchor and positive are equal, the label is 2 i."""

    def __init__(self, count):
        self.count, self.decoded = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.decoded += 1
        image = torch.full((3, 2, 2), index % 256, dtype=torch.uint8)
        image[1] = index // 256
        return image, image.clone(), 2 * index


def plain(dataset, batch, seed, cache_gib, workers):
    return PairBatches(dataset, Sampler(len(dataset), batch, seed), cache_gib, workers)


def numbers(images):
    return (images[:, 0, 0, 0].int() + 256 * images[:, 1, 0, 0].int()).tolist()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def test_random_access_equals_order_of_writing(folder):
    pairs = PairDataset(folder)
    assert len(pairs) == CONFIG.count
    assert pairs.decoded_bytes == 10 * 2 * 3 * 8 * 8
    forward = [pairs[i] for i in range(10)]
    for i in (9, 0, 4, 3, 8, 7):
        assert all(torch.equal(one, other) for one, other in zip(pairs[i][:2], forward[i][:2], strict=True))
    anchor, positive, label = forward[0]
    assert label == 0 and [pair[2] for pair in forward] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert anchor.dtype == positive.dtype == torch.uint8 and anchor.shape == positive.shape == (3, 8, 8)
    assert not torch.equal(anchor, positive)
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="0 .. 9"):
            pairs[bad]


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_other_codecs_read_alike(folder, tmp_path_factory, codec):
    other = tmp_path_factory.mktemp(codec)
    write(other, dataclasses.replace(CONFIG, codec=codec))
    limit = 40 if codec == "jpeg" else 0  # these images are noise
    for one, coded in zip(PairDataset(folder), PairDataset(other), strict=True):
        assert all((a.int() - b.int()).abs().max() <= limit for a, b in zip(one[:2], coded[:2], strict=True))


def test_dataset_may_be_sent_to_a_process(folder):
    pairs = PairDataset(folder)
    assert torch.equal(pickle.loads(pickle.dumps(pairs))[3][1], pairs[3][1])


def test_missing_pairs_say_which_stage_makes_them(folder, tmp_path_factory):
    with pytest.raises(UsageError, match="--stages pairs"):
        PairDataset(tmp_path_factory.mktemp("empty"))
    (folder / "shard-000001.tar").unlink()
    for check in (True, False):
        with pytest.raises(UsageError, match=r"shard-000001\.tar.*--stages pairs"):
            PairDataset(folder, check)


def test_incomplete_folder_is_refused(tmp_path):
    def stop(count):
        if (tmp_path / "index.json").exists():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path, progress=stop)
    with pytest.raises(UsageError, match=r"1 of 3 shards.*--stages pairs"):
        PairDataset(tmp_path)


def test_truncated_shard_is_named(folder):
    os.truncate(folder / "shard-000001.tar", 5000)
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar is truncated.*delete it.*--stages pairs"):
        PairDataset(folder)
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar"):
        [PairDataset(folder, check=False)[i] for i in range(10)]


@pytest.mark.parametrize("position", [0, 600, -1])
def test_altered_shard_is_named(folder, position):
    data = bytearray((folder / "shard-000002.tar").read_bytes())
    data[position] ^= 1
    (folder / "shard-000002.tar").write_bytes(data)
    pairs = PairDataset(folder)
    assert pairs[7][2] == PairDataset(folder, check=False)[7][2], "of a shard that is as it was"
    for index in (8, 9, 8):
        with pytest.raises(CorruptArtifactError, match=r"shard-000002\.tar is altered.*delete it.*--stages pairs"):
            pairs[index]


def test_lengthened_shard_is_named(folder):
    with open(folder / "shard-000000.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptArtifactError, match=r"shard-000000\.tar is altered"):
        PairDataset(folder)


def test_undecodable_image_is_named(folder):
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[512:560] = b"x" * 48  # the first member's PNG signature and header
    path.write_bytes(data)
    update_digest(folder, path.name, "")
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar: 00000004\.anchor\.png"):
        PairDataset(folder)[4]


def test_image_of_another_size_is_named(folder):
    forge(folder / "index.json", lambda index: index.update(image_shape=[3, 8, 9]))
    with pytest.raises(CorruptArtifactError, match=r"00000000\.anchor\.png is \[3, 8, 8\].*\[3, 8, 9\]"):
        PairDataset(folder)[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 100), st.sampled_from([NO_CACHE, 1.0]))
def test_each_pair_comes_once_an_epoch(count, batch, seed, cache_gib):
    batch = min(batch, count)
    batches = plain(Numbered(count), batch, seed, cache_gib, workers=0)
    assert batches.steps_per_epoch == count // batch
    for epoch in range(2):
        seen = []
        for step in range(batches.steps_per_epoch):
            anchors, positives, labels = batches(epoch * batches.steps_per_epoch + step)
            assert anchors.shape == (batch, 3, 2, 2) and anchors.dtype == torch.uint8
            assert labels.dtype == torch.int64 and labels.tolist() == [2 * number for number in numbers(anchors)]
            assert torch.equal(anchors, positives)
            seen += numbers(anchors)
        assert seen == permutation(count, epoch, seed)[: len(seen)].tolist()
        assert len(set(seen)) == len(seen) == count // batch * batch


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 25), st.integers(0, 25), st.sampled_from([NO_CACHE, 1.0]))
def test_resumed_batches_equal_uninterrupted_ones(stop, steps, cache_gib):
    batches = plain(Numbered(23), 4, 3, 1.0, workers=0)
    expected = [numbers(batches(step)[0]) for step in range(stop + steps)]
    resumed = plain(Numbered(23), 4, 3, cache_gib, workers=0)
    assert [numbers(resumed(step)[0]) for step in range(stop, stop + steps)] == expected[stop:]


def test_jumps_give_the_same_batches(folder):
    pairs = PairDataset(folder)
    cached, streamed = (plain(pairs, 3, 0, cache_gib, workers=0) for cache_gib in (1.0, NO_CACHE))
    assert cached.cached and not streamed.cached
    for step in (0, 1, 2, 3, 7, 7, 2, 3, 0):
        for one, other in zip(cached(step), streamed(step), strict=True):
            assert torch.equal(one, other)


def test_two_workers_give_the_same_batches(folder):
    pairs = PairDataset(folder)
    cached, streamed = (plain(pairs, 3, 5, cache_gib, workers=2) for cache_gib in (1.0, NO_CACHE))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for step in (0, 1, 2, 3, 4, 5, 6, 2, 3, 4):
        for one, other in zip(cached(step), streamed(step), strict=True):
            assert torch.equal(one, other)
            assert one.ndim == 1 or one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children(), "threads: nothing that could die, or outlive this process"


def test_a_batch_that_failed_may_be_requested_again():
    class Flaky(Numbered):
        fails = True

        def __getitem__(self, index):
            if index == 5 and self.fails:
                self.fails = False
                raise OSError("gone for a moment")
            return super().__getitem__(index)

    sound = plain(Numbered(8), 4, 0, 1.0, workers=1)
    for cache_gib, workers in itertools.product((1.0, NO_CACHE), (0, 2)):
        flaky = plain(Flaky(8), 4, 0, cache_gib, workers)
        found = []
        for step in range(4):
            try:
                batch = flaky(step)
            except OSError:
                batch = flaky(step)
            found.append(numbers(batch[0]))
        assert found == [numbers(sound(step)[0]) for step in range(4)]


def test_cache_decodes_each_pair_once():
    dataset = Numbered(12)
    batches = plain(dataset, 4, 0, 1.0, workers=0)
    looked = dataset.decoded
    for step in range(9):
        batches(step)
    assert dataset.decoded == looked + 12


def test_cached_batches_are_copies():
    batches = plain(Numbered(4), 4, 0, 1.0, workers=1)
    first = numbers(batches(0)[0])
    batches(0)[0].zero_()
    assert numbers(batches(0)[0]) == first


def test_cache_limit_counts_both_images():
    size = 10 * 2 * 3 * 2 * 2
    assert plain(Numbered(10), 2, 0, size / 2**30, workers=1).cached
    assert not plain(Numbered(10), 2, 0, (size - 1) / 2**30, workers=1).cached


def test_bad_arguments_are_named():
    for batch in (0, 5):
        with pytest.raises(UsageError, match="4 pairs"):
            plain(Numbered(4), batch, 0, 1.0, workers=1)
    with pytest.raises(ValueError, match="step"):
        plain(Numbered(4), 2, 0, 1.0, workers=1)(-1)
    with pytest.raises(TypeError, match="anchor"):
        plain([(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), 0)], 1, 0, 1.0, workers=1)


def test_reading_leaves_the_folder_alone(folder):
    before = contents(folder)
    plain(PairDataset(folder), 2, 0, 1.0, workers=1)(0)
    assert contents(folder) == before


def test_a_label_goes_before_the_pseudo_class(folder):
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    old, new = b'"pseudo_class": 0', b'"label": 3       '
    path.write_bytes(data.replace(old, new, 1))
    assert [PairDataset(folder, check=False)[i][2] for i in range(2)] == [3, 0]
    path.write_bytes(data.replace(old, b'"label":     null', 1))
    with pytest.raises(CorruptArtifactError, match=r"00000000\.json holds no label or pseudo_class"):
        PairDataset(folder, check=False)[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"index": 0, "seed": "7", "displacement": 1}', "seed: expected an integer of 64 bits, got '7'"),
        ('{"index": 0, "seed": -1, "displacement": 1}', r"seed: expected 0 .. 2\*\*32 - 1, got -1"),
        (
            '{"index": 0, "seed": 7, "displacement": 1, "label": 9223372036854775808}',
            "label: expected an integer of 64",
        ),
        (
            '{"index": 0, "seed": 7, "displacement": 1, "label": true}',
            "label: expected an integer of 64 bits, got True",
        ),
        ('{"index": 0, "seed": 7, "displacement": {}}', "displacement: expected a number, got {}"),
        ('{"index": 0, "seed": 7}', "displacement is missing"),
        ("[7]", r"its content: expected an object, got \[7\]"),
        ("[" * 70, "is not valid JSON"),
        ('"\ud800"', "is not valid JSON .'utf-8' codec"),
        ('{"index": 0}'.encode("utf-16"), "is not valid JSON .'utf-8' codec"),
    ],
)
def test_an_altered_record_of_a_pair_is_named_with_its_field(folder, record, message):
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    start, end = data.index(b'{"index": 0'), data.index(b"}") + 1
    record = record if isinstance(record, bytes) else record.encode(errors="surrogatepass")
    path.write_bytes(data[:start] + record.ljust(end - start) + data[end:])
    for read in (PairDataset(folder, check=False).record, PairDataset(folder, check=False).__getitem__):
        with pytest.raises(CorruptArtifactError, match=rf"shard-000000\.tar: 00000000\.json:? {message}"):
            read(0)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_several_positives_come_in_one_tensor_after_the_anchors(tmp_path, cache_gib, workers):
    write(tmp_path, pair_source=source(positives=3))
    pairs = PairDataset(tmp_path)
    assert pairs.decoded_bytes == 10 * 4 * 3 * 8 * 8
    batches = plain(pairs, 4, 0, cache_gib, workers)
    for step in (0, 1, 2, 0):
        batch, indices = batches(step), Sampler(10, 4, 0).indices(step)
        anchors, positives, labels = zip(*(pairs[index] for index in indices), strict=True)
        assert torch.equal(batch.anchors, torch.stack(anchors)) and batch.labels.tolist() == list(labels)
        assert torch.equal(batch.positives, torch.stack(positives, dim=1)), "[K, B, 3, H, W]"
        assert batch.images.data_ptr() == batch.anchors.data_ptr()
        one = batch.with_one_positive(torch.tensor([2, 0, 1, 2]))
        assert torch.equal(one.positives, torch.stack([positives[row][k] for row, k in enumerate((2, 0, 1, 2))]))
        for of in (batch, one, batch._replace(positives=batch.positives.clone()), batch._replace(labels=labels)):
            assert torch.equal(of.images, torch.cat((of.anchors, of.each_positive.flatten(0, 1))))


def test_a_batch_is_its_images_in_one_tensor():
    batch = plain(Numbered(4), 4, 0, 1.0, workers=1)(0)
    assert batch.images.data_ptr() == batch.anchors.data_ptr() and batch.images.shape == (8, 3, 2, 2)
    apart = PairBatch(batch.anchors.clone(), batch.positives.clone(), batch.labels)
    swapped = PairBatch(batch.positives, batch.anchors, batch.labels)
    twice = PairBatch(batch.anchors, batch.anchors, batch.labels)
    plane = PairBatch(batch.anchors, batch.positives.contiguous(), batch.labels)
    for one in (batch, apart, swapped, twice, plane, PairBatch(*(tensor[:3] for tensor in batch))):
        assert torch.equal(one.images, torch.cat((one.anchors, one.positives)))


@pytest.mark.parametrize("small", [True, False])
def test_a_step_on_a_cpu_reads_small_images_itself(folder, monkeypatch, small):
    threads, read = set(), PairDataset.read

    def noted(self, *arguments):
        threads.add(threading.get_ident())
        return read(self, *arguments)

    pairs = PairDataset(folder)
    assert pairs.small
    if not small:
        monkeypatch.setattr(PairDataset, "small", False)
    batches = open_batches(pairs, PretrainConfig(batch=5, cache_gib=0.0, workers=2), 0, torch.device("cpu"))
    monkeypatch.setattr(PairDataset, "read", noted)
    expected = plain(pairs, 5, 0, NO_CACHE, workers=0)
    threads.clear()
    found = batches(0)
    assert (threads == {threading.get_ident()}) == small
    assert all(torch.equal(one, other) for one, other in zip(found, expected(0), strict=True))
