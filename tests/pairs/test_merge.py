import dataclasses
import errno
import json
import os
import shutil

import pytest

from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.pairs.merge import main, merge
from copgen_fast.pairs.read.dataset import PairDataset
from tests.helpers.pairs_fixtures import CONFIG, IDENTITY, contents, forge, source, write

SMALL = dataclasses.replace(CONFIG, shard_size=2)  # 5 shards


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    write(folder, SMALL)
    return contents(folder)


@pytest.fixture
def folders(tmp_path):
    """Two folders with a share each."""
    for part in (0, 1):
        write(tmp_path / str(part), dataclasses.replace(SMALL, part=part, parts=2))
    return tmp_path / "0", tmp_path / "1"


@pytest.mark.parametrize("links", [True, False])
def test_shares_become_what_one_writer_makes(folders, single, links, monkeypatch):
    linked = []

    def refuse(*paths):
        linked.append(paths)
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    before = contents(folders[1])
    index = merge(*folders[:1], folders[1:])
    assert contents(folders[0]) == single
    assert contents(folders[1]) == before
    assert len(linked) == (0 if links else 4)
    assert ((folders[0] / "shard-000001.tar").stat().st_nlink == 2) == links
    assert index.complete and index.displacement_mean == json.loads(single["index.json"])["displacement_mean"]
    assert len(PairDataset(folders[0])) == 10
    assert merge(folders[0]) == index  # again changes nothing
    assert contents(folders[0]) == single


def test_shares_of_several_positives(folders, tmp_path):
    options = {"pair_source": source(positives=3)}
    write(tmp_path / "whole", SMALL, **options)
    shares = [tmp_path / f"share {part}" for part in (0, 1)]
    for part, folder in enumerate(shares):
        write(folder, dataclasses.replace(SMALL, part=part, parts=2), **options)
    with pytest.raises(UsageError, match=r"positives \(1 there, 3 here\)"):
        merge(shares[0], folders[1:])
    merge(shares[0], shares[1:])
    assert contents(shares[0]) == contents(tmp_path / "whole")


def test_into_a_new_folder(folders, single, tmp_path, capsys):
    assert main([str(tmp_path / "new"), *map(str, folders)]) == 0
    assert contents(tmp_path / "new") == single
    assert "5 shards, 10 pairs, as recorded" in capsys.readouterr().out


def test_missing_shards_are_named(folders, capsys):
    assert main([str(folders[1])]) == 2
    message = capsys.readouterr().err
    assert "3 of 5 shards are missing: shard-000000.tar, shard-000002.tar, shard-000004.tar" in message
    (folders[0] / "shard-000002.tar").unlink()
    with pytest.raises(UsageError, match=r"1 of 5 shards are missing: shard-000002\.tar: run `--stages pairs`"):
        merge(folders[0], folders[1:])
    assert not (folders[0] / "index.json").exists()


def test_a_lost_sidecar_is_named(folders):
    (folders[0] / "shard-000002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"shard-000002\.safetensors is missing"):
        merge(folders[0], folders[1:])


@pytest.mark.parametrize("name", ["shard-000003.tar", "shard-000003.safetensors"])
def test_altered_files_are_named_and_not_copied(folders, name):
    data = bytearray((folders[1] / name).read_bytes())
    data[-3] ^= 1
    (folders[1] / name).write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=rf"1/{name} is altered"):
        merge(folders[0], folders[1:])
    assert not (folders[0] / name).exists() and not (folders[0] / "index.json").exists()


def test_the_same_shard_twice_is_taken_once(folders, single):
    for name in ("shard-000001.tar", "shard-000001.safetensors", "index.part-1-of-2.json"):
        shutil.copy(folders[1] / name, folders[0] / name)
    merge(folders[0], folders[1:])
    assert contents(folders[0]) == single


def test_different_shards_of_one_name_are_named(folders, tmp_path):
    other = tmp_path / "other"
    write(other, dataclasses.replace(SMALL, part=1, parts=2))
    forge(other / "index.part-1-of-2.json", lambda index: index["shards"][0].update(sha256="0" * 64))
    with pytest.raises(CorruptArtifactError, match=r"1 and .*other hold different shards shard-000001\.tar"):
        merge(folders[0], (folders[1], other))


@pytest.mark.parametrize("name", ["shard-000009.tar", "shard-000001.safetensors"])
def test_shards_of_no_index_are_named(folders, name):
    (folders[0] / name).write_bytes(b"from elsewhere")
    (folders[0] / "notes.txt").write_text("other files may lie there")
    with pytest.raises(CorruptArtifactError, match=rf"0 holds shards that no index lists: {name}: delete"):
        merge(folders[0], folders[1:])


@pytest.mark.parametrize(
    ("identity", "config", "named"),
    [
        (IDENTITY | {"positive": "identity"}, SMALL, "positive"),
        (IDENTITY, dataclasses.replace(SMALL, count=11), "count"),
        (IDENTITY, dataclasses.replace(SMALL, codec="raw"), "codec"),
    ],
)
def test_shares_of_other_pairs_are_refused(folders, tmp_path, identity, config, named):
    write(tmp_path / "other", dataclasses.replace(config, part=1, parts=2), identity=identity)
    with pytest.raises(UsageError, match=f"other holds other pairs: .*{named}"):
        merge(folders[0], [tmp_path / "other"])


def test_a_folder_without_indexes_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no index of pairs" in capsys.readouterr().err
