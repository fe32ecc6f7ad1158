"""Labelled image sets: fixed splits, one form whatever the source, a clear message of one line for every fault."""

import dataclasses
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import sets, torchvision_sets


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        "train_labels": np.arange(12, dtype=np.uint8) % 3,
        "test_images": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        "test_labels": np.arange(5) % 3,
        "class_names": np.array(["a", "b", "c"]),
    }


@pytest.fixture
def save(tmp_path):
    def write(arrays):
        np.savez_compressed(tmp_path / "set.npz", **arrays)
        return DataConfig("npz", str(tmp_path / "set.npz"), image_size=8)

    return write


@pytest.fixture
def image_folder(tmp_path):
    """Images of one grey level a class, of sizes that all need another resize."""
    for split, shape in (("train", (20, 30)), ("test", (40, 16))):
        for level, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("L" if i else "RGBA", shape, 100 * level if i else (100 * level,) * 4).save(
                    folder / f"{i}.png"
                )
    return tmp_path


def refusal(config):
    with pytest.raises(UsageError) as caught:
        sets.load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_split_is_fixed_stratified_and_disjoint():
    one, two = sets.digits(8), sets.load(DataConfig("digits", image_size=8))
    assert one.train_images.shape == (1437, 3, 8, 8) and one.test_images.shape == (360, 3, 8, 8)
    assert one.train_images.equal(two.train_images) and one.test_labels.equal(two.test_labels)
    assert one.num_classes == 10
    shares = one.train_labels.bincount() / (one.train_labels.bincount() + one.test_labels.bincount())
    assert (shares - 0.8).abs().max() < 0.01
    train = {image.numpy().tobytes() for image in one.train_images}
    assert not any(image.numpy().tobytes() in train for image in one.test_images)


def test_digits_are_resized():
    assert sets.load(DataConfig("digits", image_size=20)).test_images.shape == (360, 3, 20, 20)


def test_npz_round_trip_is_exact_at_its_own_size(arrays, save):
    loaded = sets.load(save(arrays))
    for split in ("train", "test"):
        images, labels = getattr(loaded, f"{split}_images"), getattr(loaded, f"{split}_labels")
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1), arrays[f"{split}_images"])
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])
        assert images.is_contiguous() and labels.dtype == torch.int64


def test_npz_grey_becomes_three_equal_channels(arrays, save):
    arrays["train_images"] = arrays["train_images"][..., :1]
    images = sets.load(save(arrays)).train_images
    assert images.shape == (12, 3, 8, 8)
    for channel in images.unbind(1):
        np.testing.assert_array_equal(channel, arrays["train_images"][..., 0])


def test_npz_resizes_like_pillow_and_cuts_the_centre(arrays, save):
    arrays["test_images"] = np.random.default_rng(2).integers(0, 256, (5, 24, 48, 3), dtype=np.uint8)
    images = sets.load(save(arrays)).test_images
    whole = Image.fromarray(arrays["test_images"][0]).resize((16, 8), Image.Resampling.BICUBIC)
    expected = np.array(whole)[:, 4:12]
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": None}, "no array 'test_labels'"),
        ({"train_images": np.zeros((12, 8, 8, 3))}, "train_images is float64"),
        ({"train_images": np.zeros((12, 8, 8), np.uint8)}, "expected uint8 \\[N, H, W, 1 or 3\\]"),
        ({"train_images": np.zeros((12, 3, 8, 8), np.uint8)}, "expected uint8 \\[N, H, W, 1 or 3\\]"),
        ({"train_labels": np.zeros(11, int)}, "train_labels is int64 \\[11\\], expected integers \\[12\\]"),
        ({"train_labels": np.zeros(12)}, "train_labels is float64"),
        ({"train_labels": np.array([None] * 12)}, "train_labels is object"),
        ({"train_labels": np.arange(12) % 3 + 1}, "labels must be 0 .. C - 1.*training labels are 1, 2, 3"),
        ({"test_labels": np.arange(5)}, "test labels 0, 1, 2, 3, 4"),
        ({"test_images": np.zeros((0, 8, 8, 3), np.uint8), "test_labels": np.zeros(0, int)}, "test_images is uint8"),
    ],
)
def test_npz_faults_are_named(arrays, save, change, message):
    config = save({key: value for key, value in (arrays | change).items() if value is not None})
    with pytest.raises(UsageError, match=message):
        sets.load(config)


@pytest.mark.parametrize("keep", [0.2, 0.95])
def test_npz_truncated(arrays, save, keep):
    config = save(arrays)
    with open(config.root, "r+b") as file:
        file.truncate(int(keep * file.seek(0, 2)))
    assert "truncated or not an .npz file" in refusal(config)


def test_npz_altered(arrays, save):
    config = save(arrays)
    with zipfile.ZipFile(config.root) as archive:
        member = archive.getinfo("train_images.npy")
    with open(config.root, "r+b") as file:
        file.seek(member.header_offset + 400)
        file.write(b"\0" * 16)
    assert "truncated or not an .npz file" in refusal(config)


def test_npz_encrypted(arrays, save):
    config = save(arrays)
    data = bytearray(Path(config.root).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # each file's header, and the directory's
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data[start + flags] |= 1
    Path(config.root).write_bytes(data)
    assert "encrypted" in (message := refusal(config)) and "write it again with numpy.savez" in message


@pytest.mark.parametrize("version", [(2, 0), (3, 0), (9, 9)])
def test_npz_headers_of_other_versions(arrays, save, version):
    config = save(arrays)
    with zipfile.ZipFile(config.root, "w") as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w") as file:
                np.lib.format.write_array(file, array, version if version != (9, 9) else None)
    if version == (9, 9):
        data = Path(config.root).read_bytes()
        Path(config.root).write_bytes(data.replace(b"NUMPY\x01\x00", b"NUMPY\x09\x09"))
        assert "truncated or not an .npz file" in refusal(config)
    else:
        assert torch.equal(sets.load(config).train_labels, torch.from_numpy(arrays["train_labels"]))


def test_npz_root_is_a_folder(tmp_path):
    assert "is a folder" in refusal(DataConfig("npz", str(tmp_path)))


def test_unknown_name_lists_the_known_ones():
    message = refusal(DataConfig("cifar11"))
    assert all(name in message for name in ("cifar10,", "digits", "npz", "folder", "oxfordiiitpet"))


@pytest.mark.parametrize("name", ["npz", "folder", "cifar10"])
def test_missing_root(name, tmp_path):
    assert "needs --data.root" in refusal(DataConfig(name))
    assert "does not exist" in refusal(DataConfig(name, str(tmp_path / "nowhere")))


def test_image_size_must_be_positive():
    assert "at least 1, got 0" in refusal(DataConfig(image_size=0))


def test_folder(image_folder):
    loaded = sets.load(DataConfig("folder", str(image_folder), image_size=10))
    assert loaded.train_images.shape == (6, 3, 10, 10) and loaded.test_images.shape == (6, 3, 10, 10)
    assert loaded.train_labels.tolist() == loaded.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    for images, labels in (
        (loaded.train_images, loaded.train_labels),
        (loaded.test_images, loaded.test_labels),
    ):
        assert (images == 100 * labels[:, None, None, None]).all()


def test_folder_faults_are_named(image_folder):
    config = DataConfig("folder", str(image_folder), image_size=10)
    (image_folder / "train" / "dog" / "1.png").write_bytes(b"no image")
    assert "dog/1.png cannot be read" in refusal(config)
    extra = image_folder / "test" / "bird"
    extra.mkdir()
    assert "bird" in refusal(config)  # empty
    Image.new("L", (9, 9)).save(extra / "0.png")
    assert "in one of them only: bird" in refusal(config)
    (image_folder / "test").rename(image_folder / "held-out")
    assert "test is missing" in refusal(config)


def test_folder_truncated_image(image_folder):
    path = image_folder / "test" / "cat" / "2.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "cat/2.png cannot be read" in refusal(DataConfig("folder", str(image_folder)))


@pytest.mark.parametrize("count", [2, 30])
def test_all_images_that_cannot_be_read_are_listed_at_once_or_skipped(count, image_folder):
    config = DataConfig("folder", str(image_folder), image_size=10)
    for i in range(count - 1):
        (image_folder / "train" / "cat" / f"x{i:02d}.png").write_bytes(b"no image")
    (image_folder / "test" / "cat" / "0.png").write_bytes(b"")
    message = refusal(config)
    assert message.startswith(f"{count} images cannot be read: ") and "--data.on-corrupt skip" in message
    assert message.count("no image of a known format") == min(count, 20)
    assert ("and 10 more" in message) == (count == 30)
    with pytest.warns(UserWarning, match=f"left out {count} of {11 + count} images"):
        loaded = sets.load(dataclasses.replace(config, on_corrupt="skip"))
    assert len(loaded.train_images) == 6 and loaded.test_labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.left_out == count and (loaded.train_images == 100 * loaded.train_labels[:, None, None, None]).all()


@pytest.mark.filterwarnings("ignore:left out")
def test_what_can_be_read_must_still_suffice(image_folder):
    config = DataConfig("folder", str(image_folder), image_size=10, on_corrupt="skip")
    for path in (image_folder / "train" / "cat").iterdir():
        path.write_bytes(b"no image")
    assert "each with training images" in refusal(config)
    for path in (image_folder / "train" / "dog").iterdir():
        path.write_bytes(b"no image")
    assert "no train image can be decoded" in refusal(config)


@pytest.mark.parametrize("place", ["train", "test", "train/cat"])
def test_hidden_names_and_other_endings_are_left_out_and_counted(place, image_folder):
    config = DataConfig("folder", str(image_folder), image_size=10)
    expected = sets.load(config)
    hidden = image_folder / place / ".ipynb_checkpoints"
    hidden.mkdir()
    image = Image.new("L", (9, 9), 200)
    image.save(hidden / "x.png")
    image.save(image_folder / "train" / "dog" / "._0.png")
    for name in ("a.GIF", "b.gif", "c.jfif", "README"):
        image.save(image_folder / "train" / "dog" / name, "gif")
    (image_folder / "train" / "labels.csv").write_text("")
    with pytest.warns(UserWarning) as caught:
        found = sets.load(config)
    assert found.train_images.equal(expected.train_images) and found.train_labels.equal(expected.train_labels)
    assert str(caught[0].message) == (
        f"{image_folder}: left out 2 .gif, 1 .jfif, 2 hidden, 1 outside class folders, 1 without an ending; "
        "read 12 .png"
    )


def test_links_in_a_circle_are_followed_once(image_folder):
    (image_folder / "train" / "cat" / "more").symlink_to(image_folder / "train" / "cat")
    assert len(sets.load(DataConfig("folder", str(image_folder), image_size=10)).train_images) == 6


def test_a_fifo_among_images_or_in_place_of_a_file_is_refused(image_folder):
    os.mkfifo(image_folder / "train" / "cat" / "fifo.png")
    assert "fifo.png cannot be read as an image (it is no regular file)" in refusal(
        DataConfig("folder", str(image_folder))
    )
    assert "no regular file" in refusal(DataConfig("npz", str(image_folder / "train" / "cat" / "fifo.png")))


def test_photographs_of_torchvision_sets_are_turned_and_scaled(tmp_path, monkeypatch):
    """Where the class takes a loader, files are decoded as those of folders are."""
    exif = Image.Exif()
    exif[0x0112] = 3
    grey = np.full((6, 6), 128 * 257, np.uint16)
    grey[0] = 0
    Image.fromarray(grey).save(tmp_path / "0.png", exif=exif)

    def fake(root, split, download, loader):
        return [(loader(tmp_path / "0.png"), label) for label in (0, 1)]

    monkeypatch.setattr(datasets, "DTD", fake)
    images = sets.load(DataConfig("dtd", str(tmp_path), image_size=6)).test_images
    assert (images[:, :, :5] == 128).all() and (images[:, :, 5] == 0).all()


def test_what_is_not_needed_may_be_missing(arrays, save, image_folder):
    shutil.rmtree(image_folder / "test")
    config = DataConfig("folder", str(image_folder), image_size=10)
    assert sets.open_set(config, ("train",)).splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    config = save({"train_images": arrays["train_images"]})
    assert sets.open_set(config, ("train",), labelled=False).splits["train"].count == 12
    config = save({name: images for name, images in arrays.items() if name.endswith("images")})
    assert (sets.load(config, labelled=False).train_labels == -1).all()
    with pytest.raises(UsageError, match="no array 'train_labels'"):
        sets.open_set(config, ("train",), labelled=True)


def test_images_of_one_class_are_refused_where_classes_are_compared(image_folder):
    for split in ("train", "test"):
        shutil.rmtree(image_folder / split / "dog")
    config = DataConfig("folder", str(image_folder), image_size=10)
    assert "two classes or more" in refusal(config)
    assert len(sets.load(config, labelled=False).train_images) == 3


def write_idx(path, array):
    """MNIST's own format: magic number, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (30, 28, 28))
    for prefix, part in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        write_idx(tmp_path / f"MNIST/raw/{prefix}-images-idx3-ubyte", images[part])
        write_idx(tmp_path / f"MNIST/raw/{prefix}-labels-idx1-ubyte", np.arange(30)[part] % 10)
    return tmp_path, images


def test_torchvision_set_on_disk(mnist):
    root, images = mnist
    loaded = sets.load(DataConfig("mnist", str(root), image_size=28))
    assert loaded.train_images.shape == (20, 3, 28, 28) and loaded.test_images.shape == (10, 3, 28, 28)
    np.testing.assert_array_equal(loaded.test_images[:, 1], images[20:])
    assert loaded.train_labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("name", sorted(torchvision_sets.SETS))
def test_torchvision_sets_that_are_missing_name_the_class_that_downloads_them(tmp_path, name):
    message = refusal(DataConfig(name, str(tmp_path)))
    assert "nothing is downloaded" in message and str(tmp_path) in message
    cls = re.search(r"torchvision\.datasets\.(\w+)\(", message)[1]
    assert name == cls.lower() and hasattr(datasets, cls)


def test_torchvision_set_truncated(mnist):
    root, _ = mnist
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    assert "lacks MNIST/raw/*-ubyte, or files of it are damaged" in refusal(DataConfig("mnist", str(root)))


def test_both_validation_and_training_part_are_trained_on(tmp_path, monkeypatch):
    def fake(root, split, download):
        assert not download
        level = {"train": 10, "val": 20, "test": 30}[split]
        return [(Image.new("RGB", (6, 6), (level,) * 3), label) for label in (0, 1)]

    monkeypatch.setattr(datasets, "DTD", fake)
    loaded = sets.load(DataConfig("dtd", str(tmp_path), image_size=6))
    assert loaded.train_images[:, 0, 0, 0].tolist() == [10, 10, 20, 20]
    assert loaded.test_images[:, 0, 0, 0].tolist() == [30, 30]


def test_more_than_memory_is_refused_before_decoding(arrays, save, image_folder, monkeypatch):
    monkeypatch.setattr("copgen_fast.images.split.available_memory", lambda device: 0.003)
    for module, name in ((np.lib.format, "read_array"), (Image, "open")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("decoded"))
    assert "memory" in refusal(save(arrays))
    assert "12 images of 32 px" in refusal(DataConfig("folder", str(image_folder)))


def test_labelled_images_check_their_form():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="train_images: expected torch.uint8"):
        sets.LabelledImages(images.float(), labels, images, labels)
    with pytest.raises(ValueError, match="test_labels: expected shape \\[2\\], got \\[1\\]"):
        sets.LabelledImages(images, labels, images, labels[:1])
