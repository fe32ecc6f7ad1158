"""Packed images: the same pixels, labels and names as their source, read at random, altered files named."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copgen_fast import files
from copgen_fast.config import DataConfig
from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError
from copgen_fast.images import pack, sets, store
from copgen_fast.images.pack import PackConfig
from copgen_fast.images.real_pairs import real_pairs
from copgen_fast.images.stream import in_order, stream
from copgen_fast.images.views import Centre, RandomCrop, Whole
from copgen_fast.pairs.read.loader import PairBatches, Sampler
from copgen_fast.runtime import artifacts
from copgen_fast.verify import main
from tests.helpers import altered_files, processes, sparse_store

NAMES = ("a.JPG", "grün.png", "c.PNG", "d.webp", "e.ppm")


def photograph(number, size=(40, 28)):
    """Smooth noise."""
    small = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path):
    """Two classes of five photographs each, for training, and of two for testing."""
    for split, count in (("train", 5), ("test", 2)):
        for label, cls in enumerate(("Katze", "hund")):
            folder = tmp_path / "source" / split / cls
            folder.mkdir(parents=True)
            for number, name in enumerate(NAMES[:count]):
                photograph(10 * label + number, (40 + number, 28)).save(folder / name)
    return tmp_path / "source"


def packed(source, out, **options):
    options = {"size": 16, "codec": "png", "shard_size": 4, "workers": 2} | options
    return pack.pack(PackConfig(source, out, **options))


def opened(root, splits=sets.SPLITS, size=16):
    return sets.open_set(DataConfig("packed", str(root), size), splits)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("size", [16, 9, 100])
def test_packed_images_give_what_their_source_does(source, tmp_path, size):
    index = packed(source, tmp_path / "out", size=size)
    assert {name: split.count for name, split in index.splits.items()} == {"train": 10, "test": 4}
    direct, stored = sets.open_set(DataConfig("folder", str(source), size)), opened(tmp_path / "out", size=size)
    stored.expect_classes()
    for name in sets.SPLITS:
        one, other = direct.splits[name], stored.splits[name]
        assert one.labels.equal(other.labels) and one.classes == other.classes
        for index in reversed(range(one.count)):
            expected, label = one.read(index, Centre(size))
            image, found = other.read(index, Centre(size))
            assert image.equal(expected) and found == label
            assert other.where(index).endswith(one.where(index).removeprefix(f"{source}/"))


@pytest.mark.parametrize(("codec", "levels"), [("raw", 0), ("png", 0), ("jpeg", 40)])
def test_every_codec_keeps_the_whole_image(source, tmp_path, codec, levels):
    packed(source, tmp_path / "out", codec=codec, splits=("train",))
    split = opened(tmp_path / "out", ("train",)).splits["train"]
    direct = sets.open_set(DataConfig("folder", str(source), 16), ("train",)).splits["train"]
    assert split.places.shape[0].tolist() == [16, 22], "its aspect is kept, rounded down as by torchvision"
    for index in range(10):
        one, other = (part.read(index, Centre(16))[0].int() for part in (split, direct))
        assert (one - other).abs().max() <= levels


def test_a_shard_is_plain_webdataset(source, tmp_path):
    packed(source, tmp_path / "out", codec="jpeg")
    with tarfile.open(tmp_path / "out/train/shard-000001.tar") as tar:
        assert [member.name for member in tar][:4] == ["00000004.jpg", "00000004.json", "00000005.jpg", "00000005.json"]
        record = json.load(tar.extractfile("00000005.json"))
    assert record == {"index": 5, "label": 1, "name": f"train/hund/{NAMES[0]}"}


@pytest.mark.parametrize(("size", "small"), [(16, True), (63, True), (64, False)])
def test_small_images_are_streamed_by_one_thread(source, tmp_path, monkeypatch, size, small):
    packed(source, tmp_path / "out", size=size)
    split, threads, met = opened(tmp_path / "out").splits["train"], set(), threading.Barrier(1 if small else 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    class Noted(Centre):
        def __call__(self, pixels, index):
            threads.add(threading.get_ident())
            met.wait(60)  # for another thread, where there are two
            return super().__call__(pixels, index)

    (batch,) = stream(split, Noted(16), in_order(10, 10))
    assert split.small == small and len(threads) == (1 if small else 2)
    assert batch.images.equal(torch.stack([split.read(index, Centre(16))[0] for index in range(10)]))


def test_opening_reads_no_shard(source, tmp_path):
    packed(source, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    data = opened(tmp_path / "out")
    assert data.splits["train"].labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(CorruptArtifactError, match=r"shard-000000\.tar is altered"):
        data.splits["train"].read(0, Centre(16))


def test_each_shard_is_compared_once_and_alone(source, tmp_path, monkeypatch):
    packed(source, tmp_path / "out")
    split, hashed, original = opened(tmp_path / "out").splits["train"], [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(Path(path).name) or original(path))
    for index in (9, 0, 8, 1):
        split.read(index, RandomCrop(8, key=(index,)))
    assert hashed == ["shard-000002.tar", "shard-000000.tar"]
    assert store.verify(tmp_path / "out") == 4 and len(hashed) == 6


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "train/shard-000001.tar").unlink(), r"shard-000001\.tar is missing"),
        (lambda root: os.truncate(root / "train/shard-000001.tar", 600), r"shard-000001\.tar has 600 bytes, \d+ in"),
        (
            lambda root: (root / "train/places.safetensors").write_bytes(b"x" * 99),
            r"places\.safetensors is truncated.*: delete",
        ),
        (
            lambda root: shutil.copy(root / "test/places.safetensors", root / "train/places.safetensors"),
            r"train/places\.safetensors is not the one of index\.json",
        ),
        (lambda root: (root / "index.json").unlink(), r"index\.json is missing: .*images\.pack SOURCE"),
        (lambda root: artifacts.write_record(root / "index.json", {"format": 2}), "no index of packed images"),
        (lambda root: forge(root / "index.json"), r"index\.json: .*size"),
    ],
)
def test_missing_and_altered_files_are_named(source, tmp_path, harm, message):
    packed(source, tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(CopgenError, match=message) as caught:
        opened(tmp_path / "out")
    assert "\n" not in str(caught.value)


def forge(path):
    values = artifacts.read_record(path)
    artifacts.write_record(path, values | {"size": "large"})


def test_a_split_that_was_not_packed_is_named(source, tmp_path):
    packed(source, tmp_path / "out", splits=("test",))
    with pytest.raises(UsageError, match="has no split 'train', only test: pack it with --splits"):
        opened(tmp_path / "out")


@pytest.mark.parametrize("name", ["val", "validation"])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", None)])
def test_validation_images_are_tested_on_where_there_are_no_test_images(source, tmp_path, name, splits):
    """As ImageNet has it, packed or not, whichever name --splits has; its archives may lie beside the folders."""
    expected = sets.load(DataConfig("folder", str(source), 16))
    (source / "test").rename(source / name)
    (source / "ILSVRC2012_img_train.tar").write_bytes(b"a tar of tars")
    told = pytest.warns(UserWarning, match=rf"has no test, so {name} is taken as test")
    with told if splits[1] else contextlib.nullcontext():
        packed(source, tmp_path / "out", splits=tuple(split or name for split in splits))
    for data in (DataConfig("folder", str(source), 16), DataConfig("packed", str(tmp_path / "out"), 16)):
        with told if data.name == "folder" or not splits[1] else contextlib.nullcontext():
            found = sets.load(data)
        assert found.test_images.equal(expected.test_images) and found.train_labels.equal(expected.train_labels)


def test_test_is_test_where_both_are_there(source, tmp_path, recwarn):
    shutil.copytree(source / "train", source / "val")
    packed(source, tmp_path / "out", splits=("train", "val", "test"))
    assert opened(tmp_path / "out").splits["test"].count == 4
    packed(source, tmp_path / "other")
    assert opened(tmp_path / "other").splits["test"].count == 4
    assert not recwarn
    shutil.rmtree(source / "test")
    with pytest.raises(UsageError, match="test is missing"):
        sets.open_set(DataConfig("folder", str(source), 16), ("train", "val", "test"))


def test_pretraining_reads_packed_images_as_it_reads_files(source, tmp_path):
    packed(source, tmp_path / "out")
    direct = sets.open_set(DataConfig("folder", str(source), 16), ("train",)).splits["train"]
    stored = opened(tmp_path / "out", ("train",)).splits["train"]
    views = [real_pairs(split, Centre(16), True) for split in (direct, stored)]
    one, other = (PairBatches(pairs, Sampler(10, 4, 0)) for pairs in views)
    ranks = [PairBatches(views[1], Sampler(10, 4, 0, rank, 2)) for rank in (0, 1)]
    for step in (0, 1, 3):
        expected = one(step)
        assert other(step).images.equal(expected.images) and other(step).labels.equal(expected.labels)
        assert torch.cat([rank(step).anchors for rank in ranks]).equal(expected.anchors)


def test_an_altered_shard_is_never_skipped(source, tmp_path):
    packed(source, tmp_path / "out")
    path = tmp_path / "out/train/shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    pairs = real_pairs(opened(tmp_path / "out", ("train",)).splits["train"], Centre(16))
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar is altered"):
        PairBatches(pairs, Sampler(10, 10, 0), on_corrupt="skip")(0)


@pytest.mark.parametrize("harm", altered_files.HARMS)
def test_a_shard_that_changes_while_it_is_read_is_never_skipped(source, tmp_path, harm):
    packed(source, tmp_path / "out")
    data = sets.open_set(DataConfig("packed", str(tmp_path / "out"), 16, "skip"), ("train",))
    batches = PairBatches(real_pairs(data.splits["train"], Centre(16)), Sampler(10, 5, 0), on_corrupt="skip")
    for step in range(2):
        batches(step)
    change, said = altered_files.HARMS[harm]
    change(tmp_path / "out/train/shard-000001.tar")
    for read in (lambda: [batches(step) for step in range(4, 8)], lambda: list(data.stream("train", Centre(16)))):
        with pytest.raises(CopgenError, match=rf"shard-000001\.tar.*{said}.*pack again") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not batches.skipped and not data.faults


def test_a_shard_that_was_copied_anew_is_read_on(source, tmp_path):
    packed(source, tmp_path / "out")
    split, path = opened(tmp_path / "out").splits["train"], tmp_path / "out/train/shard-000001.tar"
    before = split.read(5, Centre(16))[0]
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    assert split.read(5, Centre(16))[0].equal(before)


def test_corrupt_images_are_left_out_counted_and_listed(source, tmp_path, capsys):
    for name in NAMES[:4]:  # a whole shard of the source
        (source / "train/Katze" / name).write_bytes(b"no image")
    assert pack.main([str(source), str(tmp_path / "out"), "--size", "16", "--shard-size", "4"]) == 0
    told = capsys.readouterr().out
    assert "train: 6 images in 3 shards" in told and "left out 4 that can't be decoded: " in told
    assert told.count("no image of a known format") == 4 and "grün.png" in told
    split = opened(tmp_path / "out").splits["train"]
    assert split.labels.tolist() == [0] + [1] * 5 and split.where(0).endswith("Katze/e.ppm")
    assert [split.read(index, Centre(16))[1] for index in range(6)] == split.labels.tolist()


def test_nothing_to_pack_is_one_line(source, tmp_path):
    for path in (source / "test").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="no test image can be decoded"):
        packed(source, tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds no folders or tars of the splits train, test"):
        packed(tmp_path, tmp_path / "other")
    with pytest.raises(UsageError, match="nothing is missing: expected a folder of images or tars"):
        packed(tmp_path / "nothing", tmp_path / "other")
    with pytest.raises(UsageError, match="--name imagenet: choose from auto, tars, "):
        packed(source, tmp_path / "other", name="imagenet")


def test_packing_again_changes_nothing_and_other_settings_are_refused(source, tmp_path):
    packed(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    packed(source, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == before
    for options in ({"size": 17}, {"codec": "raw"}, {"shard_size": 3}, {"splits": ("train",)}):
        with pytest.raises(UsageError, match="holds other packed images"):
            packed(source, tmp_path / "out", **options)
    (source / "train/Katze" / NAMES[0]).rename(source / "train/Katze/z.jpg")
    with pytest.raises(UsageError, match="holds other packed images"):
        packed(source, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty and holds no packed images"):
        packed(source, source)


def test_shards_that_were_deleted_or_cut_short_are_packed_again(source, tmp_path):
    packed(source, tmp_path / "out")
    before, folder = contents(tmp_path / "out"), tmp_path / "out/train"
    (folder / "shard-000000.tar").unlink()
    os.truncate(folder / "shard-000002.tar", 600)
    packed(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (folder / "places.safetensors").unlink()
    with pytest.raises(UsageError, match=r"places\.safetensors is missing: .* delete index\.json and pack again"):
        opened(tmp_path / "out")
    (tmp_path / "out/index.json").unlink()
    packed(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (folder / "shard-000001.tar").unlink()
    photograph(99, (40, 28)).save(source / "train/hund" / NAMES[0])
    with pytest.raises(CorruptArtifactError, match=r"shard-000001\.tar, packed again, is not the one of index\.json"):
        packed(source, tmp_path / "out")
    del before["train/shard-000001.tar"]
    assert contents(tmp_path / "out") == before, "nothing half-written"


def test_parts_and_resumes_write_the_bytes_of_one_process(source, tmp_path):
    packed(source, tmp_path / "whole")
    assert packed(source, tmp_path / "parts", part=1, parts=2) is None
    (tmp_path / "parts/train/shard-000001.tar").unlink()  # as if the process had been killed before it
    assert packed(source, tmp_path / "parts", part=0, parts=2) is None
    assert packed(source, tmp_path / "parts", part=1, parts=2) is not None
    assert {name: data for name, data in contents(tmp_path / "parts").items() if ".lock" not in name} == {
        name: data for name, data in contents(tmp_path / "whole").items() if ".lock" not in name
    }


def test_parts_that_end_at_the_same_time_leave_one_index(source, tmp_path, monkeypatch):
    """While one process reads the shards' own indexes, another one joins and removes them."""
    whole, decode = packed(source, tmp_path / "whole"), artifacts.decode_tensors
    packed(source, tmp_path / "parts", part=0, parts=2)

    def decode_meanwhile(data, path):
        monkeypatch.undo()
        assert packed(source, tmp_path / "parts", part=0, parts=2) == whole
        return decode(data, path)

    monkeypatch.setattr(artifacts, "decode_tensors", decode_meanwhile)
    assert packed(source, tmp_path / "parts", part=1, parts=2) == whole


def test_images_that_were_packed_smaller_than_asked_are_enlarged_with_a_warning(source, tmp_path, recwarn):
    packed(source, tmp_path / "out", size=16)
    sets.open_set(DataConfig("packed", str(tmp_path / "out"), 16), ("train",))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="packed at 16 pixels, enlarged to 24: pack it at --size 24"):
        sets.open_set(DataConfig("packed", str(tmp_path / "out"), 24), ("train",))


def killed(source, out):
    """Pack the images until the eleventh is written."""
    write, calls = pack.add_member, itertools.count(1)

    def add_member(*arguments):
        return os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 11 else write(*arguments)

    pack.add_member = add_member
    pack.pack(PackConfig(source, out, size=16, codec="png", shard_size=4))


def test_a_killed_process_leaves_whole_shards_and_the_next_one_goes_on(source, tmp_path):
    packed(source, tmp_path / "whole")
    assert processes.run(killed, source, tmp_path / "out").code == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out/train").glob("*.tar")] == ["shard-000000.tar"]
    kept = (tmp_path / "out/train/shard-000000.tar").stat().st_mtime_ns
    packed(source, tmp_path / "out")
    assert (tmp_path / "out/train/shard-000000.tar").stat().st_mtime_ns == kept
    found, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {name: found[name] for name in whole} == whole


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(source, tmp_path, monkeypatch):
    def full(tar, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "add_member", full)
    with pytest.raises(CopgenError, match="disk full while writing .*shard-000000.tar"):
        packed(source, tmp_path / "out")
    assert not [path for path in (tmp_path / "out/train").iterdir()]


def test_npz_and_torchvision_sets_are_packed(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    arrays = {f"{split}_images": images for split in sets.SPLITS}
    arrays |= {f"{split}_labels": np.arange(6) % 2 for split in sets.SPLITS}
    np.savez(tmp_path / "set.npz", **arrays)
    packed(tmp_path / "set.npz", tmp_path / "one")
    from torchvision import datasets

    def fake(root, split, download):
        return [(Image.fromarray(image), index % 2) for index, image in enumerate(images[:2])]

    monkeypatch.setattr(datasets, "DTD", fake)
    packed(tmp_path, tmp_path / "two", name="dtd")
    for root in ("one", "two"):
        split = opened(tmp_path / root, size=8).splits["test"]
        for index in range(split.count):
            image, label = split.read(index, Centre(8))
            assert image.permute(1, 2, 0).equal(torch.from_numpy(images[index])) and label == index % 2


def test_a_large_index_opens_without_a_look_at_the_shards(tmp_path):
    """A thousand images in each of a hundred sparse shards."""
    count, shards = 1000, 100
    root = tmp_path / "large"
    sparse_store.write(root, shards, count)
    split = opened(root, ("train",)).splits["train"]
    assert split.count == shards * count and split.labels[-1] == 99
    assert split.shard_of(0) == 0 and split.shard_of(count) == 1 and split.shard_of(shards * count - 1) == shards - 1
    assert split.places.name_of(count) == "train/n00000001/n00000001_00000000.JPEG"
    assert split.where(count).endswith("shard-000001.tar: train/n00000001/n00000001_00000000.JPEG")


def test_verify_reads_all_shards(source, tmp_path, capsys):
    packed(source, tmp_path / "out")
    assert main([str(tmp_path / "out")]) == 0
    assert "4 shards of packed images as recorded" in capsys.readouterr().out
    path = tmp_path / "out/test/shard-000000.tar"
    path.write_bytes(path.read_bytes()[::-1])
    assert main([str(tmp_path / "out")]) == 1
    assert "shard-000000.tar is altered" in capsys.readouterr().err


def unusual_images():
    """File name -> image, options of saving, and the pixels that it stands for, [4, 6, 3]."""
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    colours = np.stack([grey, grey[::-1], 255 - grey], 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    alpha = np.dstack([colours, grey])
    palette = Image.new("P", (6, 4))
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putdata([i % 2 for i in range(24)])
    checks = np.array([[0, 0, 0], [200, 100, 50]], np.uint8)[np.arange(24).reshape(4, 6) % 2]
    cmyk = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    return {
        "grey.PNG": (Image.fromarray(grey), {}, np.repeat(grey[..., None], 3, 2)),
        "bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}, np.repeat(grey[..., None], 3, 2)),
        "exif.png": (Image.fromarray(np.rot90(colours)), {"exif": exif}, colours),
        "alpha.png": (Image.fromarray(alpha), {}, colours),
        "palette.png": (palette, {}, checks),
        "cmyk.tif": (cmyk, {}, np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 6, 3))),
        "图像 ü.bmp": (Image.fromarray(colours), {}, colours),
    }


def test_unusual_images_keep_their_pixels_through_streaming_and_packing(tmp_path):
    folder, expected = tmp_path / "source/train/a", []
    folder.mkdir(parents=True)
    for name, (image, options, pixels) in sorted(unusual_images().items()):
        image.save(folder / name, **options)
        expected.append(pixels)
    (tmp_path / "elsewhere.JPEG").write_bytes((folder / "alpha.png").read_bytes())
    (folder / "zz.JPEG").symlink_to(tmp_path / "elsewhere.JPEG")
    expected.insert(6, unusual_images()["alpha.png"][2])  # the link's, before the name of other letters
    packed(tmp_path / "source", tmp_path / "out", size=4, splits=("train",))
    splits = [
        sets.open_set(DataConfig(name, str(root), 4), ("train",)).splits["train"]
        for name, root in (("folder", tmp_path / "source"), ("packed", tmp_path / "out"))
    ]
    for split in splits:
        found = [split.read(index, Whole(4))[0].permute(1, 2, 0).numpy() for index in range(split.count)]
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert splits[1].where(7) == f"{tmp_path}/out/train/shard-000001.tar: train/a/图像 ü.bmp"


def test_an_empty_class_folder_is_named(source, tmp_path):
    (source / "train/leer").mkdir()
    with pytest.raises(UsageError, match="train/leer holds no images"):
        packed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
