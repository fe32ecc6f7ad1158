import dataclasses
import itertools
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.errors import UsageError
from copgen_fast.pairs import shares
from copgen_fast.pairs.format import plan, read_complete_index, write_index
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.shares import Share
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.stages import pairs as stage
from copgen_fast.train import main, open_run, parse
from tests.conftest import TINY
from tests.helpers import processes
from tests.helpers.pairs_fixtures import CONFIG, contents, write

SMALL = dataclasses.replace(CONFIG, shard_size=2)  # 5 shards


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    write(folder, SMALL)
    return contents(folder)


def share(number, count):
    return dataclasses.replace(SMALL, part=number, parts=count)


def without_share_indexes(folder):
    return {name: data for name, data in contents(folder).items() if ".part-" not in name}


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 9))
def test_each_shard_is_in_one_share(count, pairs, shard_size):
    spans = [Share(number, count).spans(pairs, shard_size) for number in range(count)]
    assert sorted(itertools.chain(*spans)) == plan(pairs, shard_size)
    for number, mine in enumerate(spans):
        assert mine == plan(pairs, shard_size)[number::count]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_writer_of_a_shared_folder_completes_it(tmp_path, single, order):
    for turn, number in enumerate(order):
        counts = []
        result = write(tmp_path, share(number, 3), progress=counts.append)
        mine = sum(span.count for span in Share(number, 3).spans(10, 2))
        assert (result["count"], result["written"], sum(counts)) == (10, mine, mine)
        assert (result["displacement_mean"] is None) == ((tmp_path / "index.json").exists() is False) == (turn < 2)
        index = json.loads((tmp_path / f"index.part-{number}-of-3.json").read_text())
        assert [shard["first"] // 2 % 3 for shard in index["shards"]] == [number] * len(index["shards"])
    assert without_share_indexes(tmp_path) == single
    assert len(PairDataset(tmp_path)) == 10


def test_more_writers_than_shards(tmp_path, single):
    for number in range(7):
        result = write(tmp_path, share(number, 7))
    assert (result["written"], without_share_indexes(tmp_path)) == (0, single)


def test_a_single_writer_takes_over(tmp_path, single):
    write(tmp_path, share(1, 3))
    with pytest.raises(UsageError, match=r"holds parts \(index\.part-1-of-3\.json\).*copgen_fast\.pairs\.merge"):
        read_complete_index(tmp_path)
    assert write(tmp_path, SMALL)["written"] == 6
    assert contents(tmp_path) == single
    assert write(tmp_path, share(1, 3))["written"] == 0
    assert contents(tmp_path) == single


def test_writers_take_over_from_a_single_one_and_from_others(tmp_path, single):
    def stop(count):
        if (tmp_path / "index.json").exists():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path, SMALL, progress=stop)
    assert write(tmp_path, share(0, 4))["written"] == 2  # shards 0, which is there, and 4
    assert write(tmp_path, share(1, 2))["written"] == 4
    assert write(tmp_path, share(0, 2))["written"] == 2
    assert without_share_indexes(tmp_path) == single


def test_a_lost_shard_is_written_again_by_its_writer(tmp_path, single):
    for number in (0, 1):
        write(tmp_path, share(number, 2))
    os.truncate(tmp_path / "shard-000003.tar", 100)
    (tmp_path / "index.json").unlink()
    assert write(tmp_path, share(0, 2))["written"] == 0
    assert not (tmp_path / "index.json").exists()
    assert write(tmp_path, share(1, 2))["written"] == 2
    assert without_share_indexes(tmp_path) == single


def test_a_shard_on_which_indexes_disagree_is_missing_but_to_its_writer(tmp_path):
    for number in (0, 1):
        write(tmp_path, share(number, 2))
    found = shares.read_indexes(tmp_path)
    forged = dataclasses.replace(found["index.json"].shards[1], sha256="0" * 64)
    write_index(tmp_path, found["index.json"].with_shards([forged]), "index.part-0-of-9.json")
    found = shares.read_indexes(tmp_path)
    assert sorted(shares.finished_shards(tmp_path, found, "index.part-0-of-2.json")) == [
        f"shard-{number:06d}.tar" for number in (0, 2, 3, 4)
    ]
    own = shares.finished_shards(tmp_path, found, "index.part-1-of-2.json")
    assert own == {shard.name: shard for shard in found["index.json"].shards}


def test_leftovers_of_other_writers_stay(tmp_path):
    names = [
        "shard-000000.tar", "shard-000001.tar", "shard-000001.safetensors", "index.part-1-of-2.json",
        "index.part-0-of-2.json", "index.json.part-1-of-2", "index.json.part-0-of-2", "summary.json.part-1-of-2",
    ]  # fmt: skip

    def left():
        return sorted(path.name[1:].removesuffix(".incomplete") for path in tmp_path.iterdir())

    for name in names:
        (tmp_path / f".{name}.incomplete").write_bytes(b"half")
    shares.remove_leftovers(tmp_path, Share(1, 2))
    assert left() == ["index.json.part-0-of-2", "index.part-0-of-2.json", "shard-000000.tar"]
    shares.remove_leftovers(tmp_path, Share())
    assert left() == []


@pytest.mark.parametrize(("number", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_shares_out_of_range_are_named(tmp_path, number, count):
    with pytest.raises(UsageError, match=r"pairs\.part"):
        write(tmp_path, share(number, count))


def test_shares_of_other_pairs_are_left_alone(tmp_path):
    write(tmp_path, share(0, 2))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="codec"):
        write(tmp_path, dataclasses.replace(share(1, 2), codec="jpeg"))
    assert contents(tmp_path) == before


def test_the_stage_writes_shares_into_one_run(finished_run, tmp_path, capsys):
    arguments = [*TINY, "--out", str(tmp_path / "run"), "--pairs.positives", "gaussian", "--stages", "pairs"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.part-1-of-2.incomplete").write_text("another begins at the same time")
    for number in (1, 0):
        assert main([*arguments, "--pairs.part", str(number), "--pairs.parts", "2"]) == 0
        if number == 1:
            unfinished = [*arguments[:-2], "--stages", "pretrain"]
            assert main(unfinished) == 2
            captured = capsys.readouterr()
            assert "part 1 of 2 is written, others are not yet" in captured.out
            assert "holds parts (index.part-1-of-2.json)" in captured.err and "copgen_fast.pairs.merge" in captured.err
    folder, other = tmp_path / "run" / "pairs" / "gaussian", finished_run / "pairs" / "gaussian"
    shards = {path.name: path.read_bytes() for path in other.glob("shard-*")}
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == shards
    assert (folder / "index.json").read_bytes() == (other / "index.json").read_bytes()
    assert (folder / "summary.json").exists()
    assert main([*arguments, "--pairs.part", "2", "--pairs.parts", "2"]) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_divide_a_share(finished_run, tmp_path, order):
    """As under torchrun, where ranks meet at the end; here rank 0 may look for all shards before rank 1 wrote."""
    arguments = [*TINY, "--out", str(tmp_path / "run"), "--pairs.positives", "gaussian", "--pairs.parts", "2"]
    for part in (1, 0):
        config = parse([*arguments, "--pairs.part", str(part)])
        with open_run(config, torch.device("cpu")) as run:
            for rank in order:
                stage.run(dataclasses.replace(run, ranks=Ranks(rank, 2)))
    folder, other = tmp_path / "run" / "pairs" / "gaussian", finished_run / "pairs" / "gaussian"
    assert without_share_indexes(folder).keys() - {"summary.json"} == contents(other).keys() - {"summary.json"}
    assert (folder / "index.json").read_bytes() == (other / "index.json").read_bytes()
    assert sorted(path.name for path in folder.glob("index.part-*")) == [
        f"index.part-{number}-of-4.json" for number in (0, 1, 2)
    ]  # of three shards


def write_share(number, count, folder, start):
    start.wait()
    write(folder, dataclasses.replace(share(number, count), workers=1))


def test_two_processes_write_at_the_same_time(tmp_path, single):
    processes.run_ranks(write_share, 2, tmp_path / "pairs", processes.SERVER.Barrier(2))
    assert without_share_indexes(tmp_path / "pairs") == single
