import contextlib
import errno
import fcntl
import os
import signal
import threading

import pytest
import torch
from torch import nn

from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError
from copgen_fast.files import sha256
from copgen_fast.runtime import artifacts
from tests.helpers import processes


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    artifacts.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), artifacts.atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error_and_keeps_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "checkpoint.pt"
    artifacts.write_bytes(path, b"old")

    def full(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CopgenError, match=r"disk full while writing .*checkpoint\.pt .*make room"):
        artifacts.write_checkpoint(path, {"step": 1})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_a_fault_of_usage(tmp_path, monkeypatch, code):
    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(UsageError, match=rf"file\.json can't be written \({os.strerror(code)}\): choose another place"):
        artifacts.write_json(tmp_path / "new" / "file.json", {})


def test_a_disk_too_full_for_a_folder_is_named(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(tmp_path), "mkdir", full)
    with pytest.raises(CopgenError, match="disk full while writing"):
        artifacts.write_json(tmp_path / "new" / "file.json", {})


def test_writers_of_one_path_have_temporary_names_of_their_own(tmp_path):
    path = tmp_path / "file"
    with artifacts.atomic(path, by=".one") as one, artifacts.atomic(path, by=".other") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/dev/null", "it is no folder"), ("/dev/null/x", "Not a directory"), ("n" * 300, "File name too long")],
)
def test_what_can_be_no_folder_is_a_fault_of_usage(tmp_path, folder, reason):
    with pytest.raises(UsageError, match=f"{folder}.* can't be written \\({reason}\\): choose another place"):
        artifacts.write_bytes(tmp_path / folder / "file", b"")


def test_other_write_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*paths):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.write_bytes(tmp_path / "file", b"")


def test_tensors_and_checkpoints_come_back_equal(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(3)}
    artifacts.write_tensors(tmp_path / "t.safetensors", tensors)
    back = artifacts.read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    state = {"progress": {"step": 3, "finished": False}, "state": {"x": torch.ones(2)}}
    artifacts.write_checkpoint(tmp_path / "c.pt", state)
    loaded = artifacts.read_checkpoint(tmp_path / "c.pt")
    assert loaded["progress"] == state["progress"] and torch.equal(loaded["state"]["x"], torch.ones(2))


@pytest.mark.parametrize("read", [artifacts.read_tensors, artifacts.read_checkpoint, artifacts.read_json])
@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_file_is_named(tmp_path, read, keep):
    path = tmp_path / "thing"
    if read is artifacts.read_json:
        artifacts.write_json(path, {"numbers": list(range(99))})
    elif read is artifacts.read_tensors:
        artifacts.write_tensors(path, {"a": torch.ones(99)})
    else:
        artifacts.write_checkpoint(path, {"a": torch.ones(99)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptArtifactError, match="thing"):
        read(path)


def test_a_checkpoint_runs_no_pickled_code(tmp_path):
    torch.save({"module": nn.Linear(1, 1)}, tmp_path / "module.pt")
    with pytest.raises(CorruptArtifactError, match=r"module\.pt"):
        artifacts.read_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bias"), "missing bias"),
        (lambda state: state.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda state: state.update(weight=torch.ones(1, 2)), r"weight is \[1, 2\], expected \[3, 2\]"),
    ],
)
def test_weights_that_do_not_fit_fail_loudly(tmp_path, change, message):
    module = nn.Linear(2, 3)
    state = dict(module.state_dict())
    change(state)
    with pytest.raises(CorruptArtifactError, match=message):
        artifacts.load_strictly(module, state, tmp_path / "weights")


def test_a_missing_artefact_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match="run `--stages pairs`"):
        artifacts.require(tmp_path / "index.json", "pairs")
    assert artifacts.require(tmp_path, "pairs") == tmp_path


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_is_one_commands_or_its_parts(tmp_path):
    first, second = ".part-0-of-2", ".part-1-of-2"
    with artifacts.folder_lock(tmp_path / "run"):
        for part in ("", first):
            with pytest.raises(UsageError, match=f"{tmp_path}/run is in use by another command: wait"):
                with artifacts.folder_lock(tmp_path / "run", part):
                    pass
    with artifacts.folder_lock(tmp_path / "run", first), artifacts.folder_lock(tmp_path / "run", second):
        with pytest.raises(UsageError, match="in use by another command for part-1-of-2: wait"):
            with artifacts.folder_lock(tmp_path / "run", second):
                pass
        with pytest.raises(UsageError, match="in use by another command: wait"):
            with artifacts.folder_lock(tmp_path / "run"):
                pass
    with artifacts.folder_lock(tmp_path / "run"):
        pass


def hold(folder, held):
    with artifacts.folder_lock(folder):
        held.set()
        threading.Event().wait()


def test_a_kill_unlocks_the_folder(tmp_path):
    held = processes.SERVER.Event()
    child = processes.Child(hold, tmp_path, held)
    assert held.wait(60)
    with pytest.raises(UsageError, match="in use"), artifacts.folder_lock(tmp_path):
        pass
    assert child.wait(timeout=0).code == -signal.SIGKILL
    with artifacts.folder_lock(tmp_path):
        pass


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, number, goes_on):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with contextlib.nullcontext() if goes_on else pytest.raises(OSError), artifacts.folder_lock(tmp_path):
        pass
