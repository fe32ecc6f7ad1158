"""Real images as pairs: read as they are needed, the same bits as from memory, for any start and number of ranks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copgen_fast.config import DataConfig
from copgen_fast.errors import CorruptArtifactError
from copgen_fast.images import sets
from copgen_fast.images.pack import PackConfig, pack
from copgen_fast.images.real_pairs import RealPairs, real_pairs
from copgen_fast.images.split import ArraySplit
from copgen_fast.images.views import Centre
from copgen_fast.pairs.read import dali
from copgen_fast.pairs.read.loader import PairBatches, Sampler

CIFAR10 = Path(os.environ.get("COPGEN_FAST_CIFAR10", Path(__file__).parents[3] / "shared" / "data" / "cifar10.npz"))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)


@pytest.fixture
def archive(tmp_path, pixels):
    np.savez(tmp_path / "set.npz", train_images=pixels, train_labels=np.arange(12) // 4)
    return DataConfig("npz", str(tmp_path / "set.npz"))


@pytest.fixture
def files(tmp_path, pixels):
    """The same images as files, the same labels as folders."""
    for index, image in enumerate(pixels):
        path = tmp_path / "files" / "train" / str(index // 4) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return DataConfig("folder", str(tmp_path / "files"))


def pairs_of(config, size=16, labelled=True):
    return real_pairs(sets.open_set(config, ("train",)).splits["train"], Centre(size), labelled)


def batches_of(pairs, rank=0, world=1, cache=0.0, on_corrupt="stop"):
    return PairBatches(pairs, Sampler(len(pairs), 4, 0, rank, world), cache, 2, on_corrupt)


def test_each_image_is_its_own_positive(files, pixels):
    pairs = pairs_of(files)
    anchor, positive, label = pairs[5]
    assert positive is anchor and anchor.permute(1, 2, 0).equal(torch.from_numpy(pixels[5])) and label == 1
    assert pairs_of(files, labelled=False)[5][2] == -1
    batch = batches_of(pairs)(0)
    assert batch.images.shape == (8, 3, 16, 16) and batch.images[:4].equal(batch.images[4:])
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    once = 12 * 3 * 16 * 16 / 2**30
    assert batches_of(pairs, cache=once).cached and not batches_of(pairs, cache=once / 2).cached


@pytest.mark.parametrize("size", [16, 10, 23])
@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_streamed_batches_are_those_of_images_in_memory_to_the_bit(archive, files, size, cache):
    streamed, held = batches_of(pairs_of(files, size), cache=cache), batches_of(pairs_of(archive, size), cache=cache)
    assert streamed.cached == bool(cache) and not held.cached, "an array is not kept twice"
    for step in range(6):
        one, other = streamed(step), held(step)
        assert one.images.equal(other.images) and one.labels.equal(other.labels)


def test_ranks_and_resumes_see_the_same_batches(files):
    whole, resumed = batches_of(pairs_of(files)), batches_of(pairs_of(files))
    ranks = [batches_of(pairs_of(files), rank, 2) for rank in (0, 1)]
    batches = [whole(step) for step in range(5)]
    for step in (3, 4):
        assert resumed(step).anchors.equal(batches[step].anchors)
        assert torch.cat([one(step).anchors for one in ranks]).equal(batches[step].anchors)


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_an_image_is_decoded_once_an_epoch_or_once(files, cache, monkeypatch):
    pairs, read = pairs_of(files), []
    split = type(pairs.split)
    original = split.read

    def counted(self, index, view):
        read.append(index)
        return original(self, index, view)

    batches = PairBatches(pairs, Sampler(12, 4, 0), cache, workers=0)  # which decodes nothing ahead
    monkeypatch.setattr(split, "read", counted)
    for step in range(6):  # two epochs
        batches(step)
    assert sorted(read) == sorted(list(range(12)) * (1 if cache else 2))


@pytest.mark.filterwarnings("ignore:corrupt pair 6 skipped")
def test_an_image_that_cannot_be_decoded_stops_or_is_replaced_by_the_next(files, tmp_path):
    (tmp_path / "files/train/1/06.png").write_bytes(b"no image")
    with pytest.raises(CorruptArtifactError, match=r"06\.png cannot be read .*--data\.on-corrupt skip"):
        [batches_of(pairs_of(files))(step) for step in range(3)]
    batches, pairs = batches_of(pairs_of(files), on_corrupt="skip"), pairs_of(files)
    for step in range(3):
        expected = [pairs[7 if index == 6 else index][0] for index in batches.sampler.indices(step)]
        assert batches(step).anchors.equal(torch.stack(expected))
    assert batches.skipped == [6]


def test_labels_that_were_not_requested_are_none():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    assert not RealPairs(ArraySplit(4, None, lambda size: images), Centre(2), labelled=True).labelled


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not there (COPGEN_FAST_CIFAR10)")
def test_streaming_cifar10_gives_what_reading_it_into_memory_does_to_the_bit(tmp_path):
    """Its first 500 held-out images: pixels, labels and the batches of two epochs' steps, by every loader."""
    with np.load(CIFAR10) as file:
        images, labels = file["test_images"][:500], file["test_labels"][:500]
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
    held = pairs_of(DataConfig("npz", str(tmp_path / "set.npz")), 32)
    for codec in ("raw", "png"):
        pack(
            PackConfig(tmp_path / "set.npz", tmp_path / codec, 32, codec, splits=("train",), shard_size=150, workers=1)
        )
        streamed = pairs_of(DataConfig("packed", str(tmp_path / codec), 32), 32)
        for index in range(500):
            (one, _, label), (other, _, wanted) = streamed[index], held[index]
            assert one.equal(other) and one.movedim(0, 2).equal(torch.from_numpy(images[index]))
            assert label == wanted == labels[index]
        for kind in (PairBatches, dali.DaliBatches) if dali.available() else (PairBatches,):
            of_memory, of_shards = (
                kinds(pairs, Sampler(500, 128, 0)) for kinds, pairs in ((PairBatches, held), (kind, streamed))
            )
            for step in range(6):
                one, other = of_shards(step), of_memory(step)
                assert one.images.equal(other.images) and one.labels.equal(other.labels)
