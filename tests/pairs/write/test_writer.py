import dataclasses
import errno
import itertools
import json
import os
import signal
import tarfile
import threading

import pytest
import torch

from copgen_fast.errors import CopgenError, NonFiniteError, UsageError
from copgen_fast.files import sha256
from copgen_fast.images.codecs import CODECS
from copgen_fast.pairs.format import to_uint8
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.pairs.write import pipeline, writer
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.interrupts import Interrupted, handle_signals
from copgen_fast.runtime.latents import sample_each
from tests.helpers import processes
from tests.helpers.pairs_fixtures import CONFIG, IDENTITY, LATENT_DIM, contents, generate, shift, source, write


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The files that an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "pairs"
    write(folder)
    return contents(folder)


def images(folder):
    return [torch.stack(pair[:2]) for pair in PairDataset(folder)]


def test_pairs_are_those_of_their_seeds(tmp_path):
    counts = []
    result = write(tmp_path, progress=counts.append)
    seeds = [CONFIG.start_seed + i for i in range(CONFIG.count)]
    z = sample_each("truncnorm", seeds, LATENT_DIM)
    z_positive = shift(z, seeds)
    displacement = (z_positive - z).norm(dim=1)

    sidecars = [artifacts.read_tensors(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert torch.equal(torch.cat([tensors["z"] for tensors in sidecars]), z)
    torch.testing.assert_close(torch.cat([tensors["z_positive"] for tensors in sidecars]), z_positive)
    pairs = PairDataset(tmp_path)
    expected = torch.stack((to_uint8(generate(z)), to_uint8(generate(z_positive))), dim=1)
    assert (torch.stack(images(tmp_path)).int() - expected.int()).abs().max() <= 1
    for i in range(CONFIG.count):
        record = pairs.record(i)
        assert record.pop("displacement") == pytest.approx(float(displacement[i]), rel=1e-5)
        assert record == {"index": i, "seed": seeds[i], "pseudo_class": i // 4}
    assert counts == [3, 1, 3, 1, 2]
    assert (result["count"], result["written"]) == (10, 10)
    assert result["displacement_mean"] == pytest.approx(float(displacement.mean()), rel=1e-5)
    assert result["images_per_s"] == pytest.approx(20 / result["seconds"])


def test_index_lists_the_shards(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["format"], index["codec"]) == (2, "png")
    assert index["identity"] == IDENTITY
    assert (index["count"], index["shard_size"], index["latent_dim"]) == (10, 4, LATENT_DIM)
    assert index["image_shape"] == [3, 8, 8]
    assert [(shard["first"], shard["count"]) for shard in index["shards"]] == [(0, 4), (4, 4), (8, 2)]
    for shard in index["shards"]:
        path = tmp_path / shard["name"]
        assert (path.stat().st_size, sha256(path)) == (shard["bytes"], shard["sha256"])
        assert sha256(path.with_suffix(".safetensors")) == shard["sidecar_sha256"]


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_several_positives_are_drawn_apart_and_the_first_is_that_of_one(tmp_path, uninterrupted, batch):
    config = dataclasses.replace(CONFIG, batch=batch)
    result = write(tmp_path / "three", config, source(positives=3))
    write(tmp_path / "one", config)
    one, three = PairDataset(tmp_path / "one"), PairDataset(tmp_path / "three")
    for pair, more in zip(one, three, strict=True):
        anchor, first, label = pair
        assert torch.equal(more[0], anchor) and torch.equal(more[1][0], first) and more[2] == label
        assert more[1].shape == (3, 3, 8, 8) and not torch.equal(more[1][1], more[1][2])
    stored = artifacts.read_tensors(tmp_path / "three" / "shard-000001.safetensors")
    z, z_positive = stored["z"], stored["z_positive"]
    alone = artifacts.read_tensors(tmp_path / "one" / "shard-000001.safetensors")
    assert torch.equal(z, alone["z"]) and torch.equal(z_positive[:, 0], alone["z_positive"])
    for k in range(3):
        expected = to_uint8(generate(z_positive[:, k]))
        assert (torch.stack([three[i][1][k] for i in range(4, 8)]).int() - expected.int()).abs().max() <= 1
    distance = (z_positive - z[:, None]).norm(dim=2).mean(1)
    assert [three.record(i)["displacement"] for i in range(4, 8)] == pytest.approx(distance.tolist(), rel=1e-5)
    index = json.loads((tmp_path / "three" / "index.json").read_text())
    assert (index["format"], index["positives"]) == (3, 3)
    assert "positives" not in json.loads(uninterrupted["index.json"]), "as older versions wrote and read it"
    assert result["images_per_s"] == pytest.approx(40 / result["seconds"])
    with pytest.raises(UsageError, match=r"positives \(3 there, 2 here\)"):
        write(tmp_path / "three", config, source(positives=2))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bytes_do_not_depend_on_workers(tmp_path, uninterrupted, workers):
    write(tmp_path, dataclasses.replace(CONFIG, workers=workers))
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("batch", [1, 4, 256])
def test_batch_size_changes_rounding_at_most(tmp_path, uninterrupted, batch):
    write(tmp_path / "this", dataclasses.replace(CONFIG, batch=batch))
    write(tmp_path / "that")
    for one, other in zip(images(tmp_path / "this"), images(tmp_path / "that"), strict=True):
        assert (one.int() - other.int()).abs().max() <= 1
    files = contents(tmp_path / "this")
    assert all(files[name] == data for name, data in uninterrupted.items() if name.endswith(".safetensors"))


def test_second_run_writes_nothing(tmp_path, uninterrupted):
    write(tmp_path)
    result = write(tmp_path, pair_source=source(generator=None))
    assert (result["written"], result["images_per_s"]) == (0, 0)
    assert result["displacement_mean"] > 0
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.safetensors", "shard-000002.tar", "index.json"])
@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_missing_and_short_files_are_written_again(tmp_path, uninterrupted, name, harm):
    write(tmp_path)
    if harm == "delete" or name == "index.json":
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, 100)
    written = write(tmp_path)["written"]
    assert written == {"shard-000002.tar": 2, "index.json": 10}.get(name, 4)
    assert contents(tmp_path) == uninterrupted


def test_a_second_run_refuses_shards_of_others(tmp_path):
    write(tmp_path)
    (tmp_path / "shard-000007.tar").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"holds shard-000007\.tar, which is none of its shards: remove it"):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_a_second_run_reads_no_finished_shard(tmp_path, monkeypatch):
    """What reads them compares their digests."""
    write(tmp_path)
    (tmp_path / "shard-000002.tar").unlink()
    hashed = []
    monkeypatch.setattr(writer, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    monkeypatch.setattr("copgen_fast.files.sha256", lambda path: pytest.fail(f"read {path}"))
    write(tmp_path)
    assert hashed == [".shard-000002.tar.incomplete", "shard-000002.safetensors"]


def test_lost_shards_are_said_and_written_again(tmp_path, uninterrupted, capsys):
    write(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    assert write(tmp_path)["written"] == 4 and contents(tmp_path) == uninterrupted
    assert "1 shards are missing or cut short, from shard-000001.tar on: written again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("identity", "config", "named"),
    [
        (IDENTITY | {"positive": "identity"}, CONFIG, "positive"),
        (IDENTITY | {"generator": {"name": "analytic", "sha256": "11"}}, CONFIG, "generator"),
        (IDENTITY, dataclasses.replace(CONFIG, count=11), "count"),
        (IDENTITY, dataclasses.replace(CONFIG, shard_size=5), "shard_size"),
        (IDENTITY, dataclasses.replace(CONFIG, codec="jpeg"), r"codec \(png there, jpeg here\)"),
    ],
)
def test_pairs_of_something_else_are_left_alone(tmp_path, uninterrupted, identity, config, named):
    write(tmp_path)
    with pytest.raises(UsageError, match=named):
        write(tmp_path, config, identity=identity)
    assert contents(tmp_path) == uninterrupted


def test_identity_may_hold_tuples(tmp_path):
    identity = IDENTITY | {"shape": (3, 8)}
    write(tmp_path, identity=identity)
    assert write(tmp_path, identity=identity)["written"] == 0


@pytest.mark.parametrize("batches", [0, 1, 4])
@pytest.mark.parametrize("how", ["exception", "sigterm"])
def test_stopped_run_goes_on_to_the_same_bytes(tmp_path, uninterrupted, batches, how):
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == batches + 1:
            if how == "exception":
                raise ZeroDivisionError
            signal.raise_signal(signal.SIGTERM)

    outcome = None
    with handle_signals():
        try:
            write(tmp_path, progress=stop)
        except (ZeroDivisionError, Interrupted) as error:
            outcome = error
    files = contents(tmp_path)
    assert all(uninterrupted[name] == data for name, data in files.items() if name != "index.json")
    assert isinstance(outcome, Interrupted) == (how == "sigterm" and batches < 4)  # asked in the last batch, it is done
    if isinstance(outcome, Interrupted):
        assert f"{tmp_path}" in str(outcome) and "shard-" in str(outcome)
    shards = [name for name in files if name.endswith(".tar")]
    assert len([name for name in files if name.endswith(".safetensors")]) == len(shards)
    assert ("index.json" in files) == bool(shards)
    write(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("names", [("shard-000002.tar", "index.json"), ("shard-000001.safetensors",)])
def test_leftovers_of_a_kill_are_replaced(tmp_path, uninterrupted, names):
    write(tmp_path)
    for name in names:
        (tmp_path / name).rename(tmp_path / f".{name}.incomplete")
    (tmp_path / ".shard-000000.tar.incomplete").write_bytes(b"half")
    write(tmp_path)
    assert contents(tmp_path) == uninterrupted


def killed(folder, batches):
    """Write pairs until as many batches are reported."""
    reports = itertools.count(1)

    def die(count):
        if next(reports) == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    write(folder, dataclasses.replace(CONFIG, workers=2), progress=die)


def test_killed_within_a_shard_it_loses_that_shard_alone(tmp_path, uninterrupted):
    """In the second shard, then, resumed, in the third."""
    for batches, shards in ((3, 1), (4, 2)):  # resumed, it reports the pairs that are there first
        assert processes.run(killed, tmp_path, batches).code == -signal.SIGKILL
        files = contents(tmp_path)
        assert f".shard-{shards:06d}.tar.incomplete" in files
        assert len([name for name in files if name.startswith("shard") and name.endswith("tar")]) == shards
        assert all(uninterrupted[name] == data for name, data in files.items() if name.startswith("shard"))
    assert write(tmp_path)["written"] == 2
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_of_an_encoder_leaves_nothing_half_written(tmp_path, uninterrupted, monkeypatch, workers, error):
    encoded, encode = [], CODECS["png"].encode

    def fail(image):
        encoded.append(image)
        if len(encoded) > 10:  # in the second shard
            raise error("no room")
        return encode(image)

    with monkeypatch.context() as patch:
        patch.setitem(CODECS, "png", dataclasses.replace(CODECS["png"], encode=fail))
        with pytest.raises(error, match="no room"):
            write(tmp_path, dataclasses.replace(CONFIG, workers=workers))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]
    assert all(uninterrupted[name] == data for name, data in contents(tmp_path).items() if name != "index.json")
    assert len(list(tmp_path.glob("*.tar"))) == 1
    write(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("queued", [0, 1])
def test_generation_is_a_stated_number_of_batches_ahead(tmp_path, uninterrupted, monkeypatch, queued):
    """Also as on a GPU, where a batch is launched beyond the one that is waited for: there are buffers enough."""
    monkeypatch.setattr(pipeline, "batches_queued", lambda device: queued)
    made, lead = [], []

    def counted(z):
        made.append(len(z))
        return generate(z)

    write(tmp_path, pair_source=source(counted), progress=lambda count: lead.append(len(made) // 2 - len(lead) - 1))
    assert contents(tmp_path) == uninterrupted
    assert lead == [1 + queued] * (4 - queued) + [1, 0][1 - queued :]


def test_an_exception_comes_after_the_items_before_it():
    def items():
        yield from (1, 2, 3)
        raise ZeroDivisionError

    found = []
    with pytest.raises(ZeroDivisionError):
        for item in pipeline.prefetch(items(), 5):
            found.append(item)
    assert found == [1, 2, 3]
    assert list(pipeline.prefetch(iter(range(5)), 2)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_only_folder_is_a_fault_of_usage(tmp_path, monkeypatch, workers):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(UsageError, match=r"shard-000000\.tar can't be written \(Read-only file system\)"):
        write(tmp_path, dataclasses.replace(CONFIG, workers=workers))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("call", (1, 3, 5, 8, 17))
def test_full_disk_at_any_file_leaves_only_whole_shards(tmp_path, uninterrupted, monkeypatch, call):
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CopgenError, match="disk full while writing"):
            write(tmp_path)
    files = contents(tmp_path)
    assert all(uninterrupted[name] == data for name, data in files.items() if name != "index.json")
    write(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_full_disk_within_a_shard(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "add_member", full)
    with pytest.raises(CopgenError, match=r"disk full while writing .*shard-000000\.tar"):
        write(tmp_path)
    assert contents(tmp_path) == {}


def bad_images(z):
    return torch.where(z[:, :1, None, None] > BAD_Z, torch.nan, generate(z))


Z = sample_each("truncnorm", range(7, 17), LATENT_DIM)[:, 0]
BAD_PAIR = 5
BAD_Z = float(Z[BAD_PAIR]) - 1e-6


def test_nan_images_are_named(tmp_path):
    first = int((Z > BAD_Z).int().argmax())  # Z[5] or an earlier pair beyond it
    with pytest.raises(NonFiniteError, match=rf"^images of anchors: .*sample {first}$"):
        write(tmp_path, pair_source=source(bad_images, lambda z, seeds: z))


@pytest.mark.parametrize("pair", [0, 5, 9])
def test_nan_positives_are_named(tmp_path, pair):
    def positive(z, seeds):
        return torch.stack([row * torch.nan if seed == 7 + pair else row for row, seed in zip(z, seeds, strict=True)])

    with pytest.raises(NonFiniteError, match=rf"^z_positive: .*sample {pair}$"):
        write(tmp_path, pair_source=source(positive=positive))
    files = contents(tmp_path)
    assert len([name for name in files if name.endswith(".tar")]) == pair // 4
    assert not [name for name in files if "incomplete" in name]


def test_wrong_tensors_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"positive\(z, seeds\).*\[4, 4\]"):
        write(tmp_path, pair_source=source(positive=lambda z, seeds: z[:1]))
    with pytest.raises(ValueError, match=r"generator\(z\)"):
        write(tmp_path, pair_source=source(generator=lambda z: generate(z)[:, :1]))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["count", "shard_size", "batch", "samples_per_class", "workers"])
def test_sizes_too_small_are_named(tmp_path, name):
    with pytest.raises(UsageError, match=f"pairs.{name}"):
        write(tmp_path, dataclasses.replace(CONFIG, **{name: -1 if name == "workers" else 0}))


@pytest.mark.parametrize("start_seed", [-1, 2**32 - 9])
def test_seeds_out_of_range_are_named(tmp_path, start_seed):
    with pytest.raises(UsageError, match=r"pairs\.start_seed"):
        write(tmp_path, dataclasses.replace(CONFIG, start_seed=start_seed))


def test_no_gradient_is_recorded(tmp_path):
    modes = []

    def generator(z):
        modes.append(torch.is_grad_enabled())
        return generate(z)

    layer = torch.nn.Linear(LATENT_DIM, LATENT_DIM)
    write(tmp_path, pair_source=source(generator, lambda z, seeds: z + layer(z)))
    assert modes and not any(modes)
