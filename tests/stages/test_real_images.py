"""Faults of real images are found before the first stage, and a stage asks for nothing that it doesn't need."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from copgen_fast import files
from copgen_fast.images.pack import PackConfig, pack
from copgen_fast.pairs.read import dali
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run, probe
from copgen_fast.train import main, parse, validate
from copgen_fast.training.metrics import read_rows
from tests.conftest import TINY

REAL = ["--pretrain.data", "real"]
COLLAPSE = ["--probe.evals", "collapse"]


def class_folders(root, classes=("all",), splits=("train", "test"), count=20):
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 100 * number + i).save(folder / f"{i:02d}.png")
    return ["--data.name", "folder", "--data.root", str(root)]


def archive(path, first_label=0, **changes):
    """An .npz file of two classes, 20 training images and 20 test images."""
    labels = np.arange(20) % 2 + first_label
    images = np.zeros((20, 8, 8, 3), np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return ["--data.name", "npz", "--data.root", str(path)]


def refusal(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out), *arguments]) == 2
    assert not out.exists(), "a stage ran"
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def accepted(arguments):
    validate(parse([*TINY, *arguments]))


def test_unlabelled_images_are_refused_by_what_needs_labels_alone(tmp_path, capsys):
    data = class_folders(tmp_path / "data")
    assert "evaluation linear needs two classes or more" in refusal(data, tmp_path, capsys)
    assert "--method supcon needs two" in refusal(
        [*data, *REAL, "--method", "supcon", "--stages", "pretrain"], tmp_path, capsys
    )
    accepted([*data, *COLLAPSE])
    accepted([*data, *REAL, "--stages", "pretrain"])


def test_labels_from_1_are_refused_where_they_are_needed(tmp_path, capsys):
    data = archive(tmp_path / "set.npz", first_label=1)
    assert "labels must be 0 .. C - 1" in refusal(data, tmp_path, capsys)
    accepted([*data, *COLLAPSE])
    accepted([*data, *REAL, "--stages", "pretrain"])
    accepted([*data, "--stages", "navigator", "pairs", "pretrain"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evals.options", "knn.neighbours=21"], "knn.neighbours: expected 1 .. 20 training images, got 21"),
        (["--evals.options", "lowshot.shots=11"], "lowshot.shots: expected 1 .. 10, the training images of class 0"),
        ([*REAL, "--pretrain.batch", "32"], "pretrain.batch: expected at most the 20 training images, got 32"),
    ],
)
def test_too_few_images_are_found_at_once(options, message, tmp_path, capsys):
    assert message in refusal([*archive(tmp_path / "set.npz"), *options], tmp_path, capsys)


def test_pretraining_needs_neither_test_images_nor_labels(tmp_path, capsys):
    folders = class_folders(tmp_path / "data", splits=("train",))
    accepted([*folders, *REAL, "--stages", "pretrain"])
    assert "test is missing" in refusal([*folders, *REAL], tmp_path, capsys)
    data = archive(tmp_path / "set.npz", train_labels=None, test_images=None, test_labels=None)
    accepted([*data, *REAL, "--stages", "pretrain"])
    assert "no array 'test_images'" in refusal(data, tmp_path, capsys)


def test_an_unreadable_first_image_is_found_at_once_with_all_others(tmp_path, capsys):
    data = class_folders(tmp_path / "data", classes=("a", "b"))
    for name in ("train/a/00.png", "train/b/07.png", "test/b/03.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    line = refusal(data, tmp_path, capsys)
    assert re.search(r"3 images cannot be read: .*train/a/00.png .*train/b/07.png .*test/b/03.png", line)
    accepted([*data, "--data.on-corrupt", "skip"])


def test_an_evaluation_of_the_users_own_may_do_without_labels(tmp_path, capsys):
    data = class_folders(tmp_path / "data")
    own = tmp_path / "mine.py"
    own.write_text("def evaluate(encoder, config, run): ...\n")
    assert "evaluation mine needs two" in refusal([*data, "--probe.evals", str(own)], tmp_path, capsys)
    own.write_text("NEEDS_LABELS = False\ndef evaluate(encoder, config, run): ...\n")
    accepted([*data, "--probe.evals", str(own)])


@pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
def test_dali_is_refused_for_images_packed_at_another_size_and_for_files(tmp_path, capsys):
    data = class_folders(tmp_path / "data", splits=("train",))
    pack(PackConfig(tmp_path / "data", tmp_path / "packed", size=8, codec="raw", splits=("train",), workers=1))
    options = [*REAL, "--stages", "pretrain", "--pretrain.loader", "dali"]
    packed = ["--data.name", "packed", "--data.root", str(tmp_path / "packed")]
    accepted([*packed, *options, "--data.image-size", "8"])
    capsys.readouterr()
    line = refusal([*packed, *options, "--data.image-size", "16"], tmp_path, capsys)
    assert "images packed at 8 px would all be resized to 16: pack them by --size 16, or choose plain" in line
    assert "images of data set folder are in none: pack them by" in refusal([*data, *options], tmp_path, capsys)


@pytest.mark.filterwarnings("ignore:left out", "ignore:corrupt pair")
def test_images_left_out_are_counted_in_the_results(tmp_path):
    data = class_folders(tmp_path / "data", classes=("a", "b"))
    (tmp_path / "data/train/b/07.png").write_bytes(b"no image")
    out = tmp_path / "run"
    command = [*TINY, *data, *REAL, *COLLAPSE, "--out", str(out), "--pretrain.epochs", "1"]
    command += ["--pretrain.batch", "40"]  # all of them
    assert main([*command, "--data.on-corrupt", "skip", "--stages", "pretrain", "probe"]) == 0
    assert json.loads((out / "pretrain/real/simclr/summary.json").read_text())["corrupt_pairs"] == 1
    assert json.loads((out / "probe/real.json").read_text())["corrupt_images"] == 1


@pytest.mark.parametrize(("size", "lines"), [(32, 0), (16, 1)])
def test_a_probe_at_another_size_than_the_pairs_says_so(size, lines, tmp_path, capsys):
    config = parse([*TINY, "--data.image-size", str(size)])
    run = Run(config, tmp_path, "cpu")
    probe.tell_other_size(run)  # no pairs are left
    index = {"identity": {}, "count": 1, "shard_size": 1, "image_shape": [3, 32, 32], "latent_dim": 1, "codec": "png"}
    for source in config.pairs.positives:
        artifacts.write_json(run.pairs_folder(source) / "index.json", {"format": 2, "shards": [], **index})
    probe.tell_other_size(run)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == lines
    assert all("images of 16 x 16 pixels" in line and "--data.image-size 32" in line for line in told)


def test_encoders_are_measured_on_the_pairs_that_they_were_pretrained_on(tmp_path):
    run = Run(parse([*TINY, "--pairs.positives", "gaussian", "identity"]), tmp_path, "cpu")
    names = {
        source: folder and folder.name for source in ("identity", "random") for folder in [probe.pairs_of(run, source)]
    }
    assert names == {"identity": "identity", "random": "gaussian"}
    assert probe.pairs_of(Run(parse([*TINY, *REAL]), tmp_path, "cpu"), "real") is None


def test_packed_images_are_pretrained_on_and_evaluated_as_their_source_is(tmp_path, monkeypatch):
    """Lossless, the logged losses and the results are the same; and the whole run hashes each shard once."""
    data = class_folders(tmp_path / "data", classes=("a", "b"))
    pack(PackConfig(tmp_path / "data", tmp_path / "packed", size=16, codec="png", shard_size=8))
    results, hashed, sha256 = [], Counter(), files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.update([str(path)]) or sha256(path))
    shards = ["--data.name", "packed", "--data.root", str(tmp_path / "packed")]
    for name, source in (("of files", data), ("of shards", shards)):
        out = tmp_path / name
        options = ["--pretrain.epochs", "1", "--stages", "pretrain", "probe"]
        assert main([*TINY, *source, *REAL, *COLLAPSE, "--out", str(out), *options]) == 0
        losses = [row["loss"] for row in read_rows(out / "pretrain/real/simclr/metrics.jsonl")]
        results.append((losses, json.loads((out / "probe/real.json").read_text())["feature_std"]))
    assert results[0] == results[1]
    packed = {name: count for name, count in hashed.items() if name.startswith(f"{tmp_path}/packed")}
    assert packed == {str(path): 1 for path in (tmp_path / "packed").rglob("*.tar")}
