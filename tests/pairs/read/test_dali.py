import dataclasses
import gc
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from copgen_fast.config import DataConfig, PretrainConfig
from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError
from copgen_fast.images import sets
from copgen_fast.images.pack import PackConfig, pack
from copgen_fast.images.real_pairs import RealPairs, real_pairs
from copgen_fast.images.split import ArraySplit
from copgen_fast.images.store import PackedSplit
from copgen_fast.images.views import Centre
from copgen_fast.pairs.read import dali, loader
from copgen_fast.pairs.read.loader import PairBatches, PairDataset, Sampler, open_batches
from tests.helpers.pairs_fixtures import CONFIG, source, write

SIZES = [(40, 28), (17, 30), (16, 16), (64, 16), (12, 10), (23, 33), (90, 16), (16, 17), (41, 28), (28, 28)]
"""Width and height of photographs; one is smaller than what is taken of them, two are long."""
needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["png", "jpeg", "raw", "png of several positives", "raw of several positives"])
def pairs(request, tmp_path_factory):
    codec, _, several = request.param.partition(" of ")
    folder = tmp_path_factory.mktemp(codec)
    write(folder, dataclasses.replace(CONFIG, codec=codec), source(positives=3 if several else 1))
    return PairDataset(folder)


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    folder = tmp_path_factory.mktemp("png")
    write(folder)
    return PairDataset(folder)


@pytest.fixture(scope="module", params=["png", "jpeg", "raw"])
def packed(request, tmp_path_factory):
    """Packed photographs of 16 pixels, two classes, in shards of four."""
    root = tmp_path_factory.mktemp(request.param)
    for number, size in enumerate(SIZES):
        small = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
        path = root / "source/train" / str(number // 5) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    pack(PackConfig(root / "source", root / "packed", 16, request.param, splits=("train",), shard_size=4, workers=1))
    return root / "packed"


def images_of(packed, size=16, labelled=True):
    """Anew, as another process opens them."""
    split = sets.open_set(DataConfig("packed", str(packed), size), ("train",)).splits["train"]
    return real_pairs(split, Centre(size), labelled)


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@needs_dali
@pytest.mark.parametrize("window", [None, 2])
def test_batches_are_those_of_the_plain_loader(pairs, window):
    """Bit for bit; of JPEG too, as both decode by libjpeg-turbo on a CPU."""
    sampler = Sampler(10, 3, 0, shard_size=4, window=window)
    plain, through_dali = PairBatches(pairs, sampler), dali.DaliBatches(pairs, sampler)
    assert through_dali.steps_per_epoch == plain.steps_per_epoch == 3
    for step in (*range(9), 3, 4, 4, 0, 8):
        one, other = plain(step), through_dali(step)
        assert same(one, other)
        assert [x.stride() for x in one] == [x.stride() for x in other]
        assert [x.dtype for x in other] == [torch.uint8, torch.uint8, torch.int64]


@needs_dali
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([0, 2]), st.sampled_from([1, 2]))
def test_resumes_and_ranks_give_what_one_process_gave(png, start, steps, workers, world):
    single = PairBatches(png, Sampler(10, 4, 5))
    resumed = [dali.DaliBatches(png, Sampler(10, 4, 5, rank, world), workers) for rank in range(world)]
    for step in range(start, start + steps):
        parts = [rank(step) for rank in resumed]
        assert same([torch.cat(part) for part in zip(*parts, strict=True)], single(step))


@needs_dali
def test_batches_are_copies(png):
    batches = dali.DaliBatches(png, Sampler(10, 2, 0))
    first = batches(0)
    kept = [tensor.clone() for tensor in first]
    for step in range(1, 8):
        batches(step)
    assert same(first, kept)


@needs_dali
def test_a_failure_that_is_no_images_is_reported(png, monkeypatch):
    from nvidia.dali import Pipeline

    batches = dali.DaliBatches(png, Sampler(10, 2, 0), on_corrupt="skip")
    batches(0)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "share_outputs", lambda self: (_ for _ in ()).throw(RuntimeError("broke\ndown")))
        with pytest.raises(CopgenError, match=r"use `--pretrain\.loader plain` \(broke down\)"):
            batches(1)
    assert same(batches(1), PairBatches(png, Sampler(10, 2, 0))(1))


@needs_dali
def test_jumps_close_pipelines_whose_files_are_in_use(png):
    """Without the garbage collector, so that the order of deletion is that of reference counts."""
    batches, plain = dali.DaliBatches(png, Sampler(10, 2, 0)), PairBatches(png, Sampler(10, 2, 0))
    gc.disable()
    try:
        assert all(same(batches(step), plain(step)) for step in (0, 4, 1, 3))
        del batches
    finally:
        gc.enable()


@needs_dali
def test_bad_steps_are_named(png):
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        dali.DaliBatches(png, Sampler(10, 2, 0))(-1)


@needs_dali
def test_packed_images_are_those_of_the_plain_loader(packed):
    """Bit for bit, cropped or resized as the view has it, from any step on and for any number of ranks."""
    sampler = Sampler(10, 4, 0)
    plain, whole = PairBatches(images_of(packed), sampler), dali.DaliBatches(images_of(packed), sampler)
    ranks = [dali.DaliBatches(images_of(packed), Sampler(10, 4, 0, rank, 2)) for rank in (0, 1)]
    for step in (0, 1, 2, 5, 3):
        wanted, found = plain(step), whole(step)
        assert same(wanted, found) and [x.stride() for x in wanted] == [x.stride() for x in found]
        assert found.images[:4].equal(found.images[4:]), "each is its own positive"
        assert same([torch.cat(part) for part in zip(*(rank(step) for rank in ranks), strict=True)], wanted)
    assert set(dali.DaliBatches(images_of(packed, labelled=False), sampler)(0).labels.tolist()) == {-1}


@needs_dali
@pytest.mark.filterwarnings("ignore:corrupt pair")
def test_packed_images_that_do_not_decode_are_replaced_by_the_next(packed, monkeypatch):
    """Also those of another size than the index says, which DALI is never given."""
    pairs, sampler = images_of(packed), Sampler(10, 5, 0)
    file, split = PackedSplit.file, pairs.split
    bad = {1: file(split, 0), 5: file(split, 5)[:-40], 7: b"no image"}
    monkeypatch.setattr(PackedSplit, "file", lambda self, index: bad.get(index) or file(self, index))
    plain, through_dali = (kind(pairs, sampler, on_corrupt="skip") for kind in (PairBatches, dali.DaliBatches))
    for step in range(4):
        assert same(plain(step), through_dali(step))
    assert plain.skipped == through_dali.skipped and {1, 7} <= set(plain.skipped)
    del bad[1], bad[5]
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar: train/1/7\.png .*--data\.on-corrupt skip"):
        [dali.DaliBatches(pairs, Sampler(10, 1, 0))(step) for step in range(10) if step != 1]


def test_dali_reads_images_that_were_packed_at_their_size(packed, monkeypatch):
    monkeypatch.setattr(dali, "DaliBatches", lambda *arguments: "dali")
    options = PretrainConfig(batch=4, loader="dali")
    assert open_batches(images_of(packed), options, 0, CPU) == "dali"
    other = images_of(packed, size=12)
    with pytest.raises(
        UsageError, match=r"packed at 16 px would all be resized to 12: pack them by --size 12, or choose"
    ):
        open_batches(other, options, 0, CPU)
    monkeypatch.setattr(dali, "available", lambda: True)
    monkeypatch.setattr(loader, "PairBatches", lambda *arguments: "plain")
    for images, gib, wanted in (
        (images_of(packed), 0.0, "dali"),
        (images_of(packed), 1.0, "plain"),
        (other, 0.0, "plain"),
    ):
        options = PretrainConfig(batch=4, cache_gib=gib)
        assert open_batches(images, options, 0, torch.device("cuda")) == wanted


@pytest.mark.skipif(not torch.cuda.is_available() or not dali.available(), reason="no GPU, or no DALI")
@pytest.mark.parametrize("kind", [PairBatches, dali.DaliBatches])
def test_batches_on_a_gpu_are_those_of_the_cpu(pairs, kind):
    sampler = Sampler(10, 3, 0)
    there, here = kind(pairs, sampler, device=torch.device("cuda")), PairBatches(pairs, sampler)
    tolerance = 4 if pairs.index.codec == "jpeg" and kind is dali.DaliBatches else 0
    for step in (*range(7), 2, 3):
        batch = there(step)
        assert all(tensor.is_cuda for tensor in batch)
        assert batch.anchors.is_contiguous(memory_format=torch.channels_last)
        for one, other in zip(batch, here(step), strict=True):
            assert (one.cpu().int() - other.int()).abs().max() <= tolerance


def test_the_chosen_loader_is_taken(png):
    chosen = {"dali": "DaliBatches", "plain": "PairBatches", "auto": "PairBatches"}
    for name, kind in chosen.items():
        if name == "dali" and not dali.available():
            continue
        options = PretrainConfig(batch=4, loader=name, workers=0, shuffle_shards=2)
        batches = open_batches(png, options, 7, CPU, rank=1, world=2)
        assert type(batches).__name__ == kind
        assert batches.sampler == Sampler(10, 4, 7, 1, 2, 4, 2)


def test_auto_is_dali_for_what_no_cache_holds_on_a_gpu(png, monkeypatch):
    monkeypatch.setattr(dali, "DaliBatches", lambda *arguments: "dali")
    monkeypatch.setattr(loader, "PairBatches", lambda *arguments: "plain")
    for there, gib, device, wanted in (
        (True, 0.0, "cuda", "dali"),
        (True, 1.0, "cuda", "plain"),
        (False, 0.0, "cuda", "plain"),
        (True, 0.0, "cpu", "plain"),
    ):
        monkeypatch.setattr(dali, "available", lambda there=there: there)
        options = PretrainConfig(batch=4, cache_gib=gib)
        assert open_batches(png, options, 0, torch.device(device)) == wanted


def test_dali_chosen_and_missing_is_one_clear_error(png, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not dali.available()
    with pytest.raises(
        UsageError, match=r"DALI is not installed: `pip install 'copgen_fast\[dali\]'`, or choose plain"
    ):
        open_batches(png, PretrainConfig(batch=4, loader="dali"), 0, CPU)


def test_dali_reads_no_images_that_are_in_no_shards():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    real = RealPairs(ArraySplit(4, None, lambda size: images), Centre(2))
    with pytest.raises(UsageError, match=r"loader dali: these images are in no shards: pack them by .*choose plain"):
        open_batches(real, PretrainConfig(batch=4, loader="dali"), 0, CPU)
    with pytest.raises(UsageError, match="window of 2 shards"):
        open_batches(real, PretrainConfig(batch=4, shuffle_shards=2), 0, CPU)
