import os
import shutil

import pytest

from copgen_fast import files, train, verify
from copgen_fast.convert.__main__ import main as convert
from copgen_fast.errors import UsageError
from copgen_fast.runtime import artifacts
from copgen_fast.training.metrics import read_rows

READERS = {
    "bytes": files.read_bytes,
    "digest": files.sha256,
    "checkpoint": artifacts.read_checkpoint,
    "tensors": artifacts.read_tensors,
    "record": artifacts.read_record,
    "log": read_rows,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "words"), [("pipe", "is a pipe"), ("folder", "is a folder"), ("link", "is a device")])
def test_what_is_no_regular_file_is_named_at_once(tmp_path, reader, kind, words):
    path = tmp_path / "it"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("/dev/zero", path)}[kind](path)
    with pytest.raises(UsageError, match=f"it {words}: expected a regular file"):
        READERS[reader](path)


@pytest.mark.parametrize(
    ("path", "words"), [("none", "none is missing"), ("/proc/self/mem", "can't be read"), ("\0", "can't")]
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        files.read_bytes(path)


@pytest.mark.parametrize("name", ["config.json", "index.json", "shard-000000.tar"])
def test_commands_do_not_wait_for_pipes_in_a_run_folder(copied_run, capsys, name):
    path = copied_run / name if name == "config.json" else copied_run / "pairs" / "identity" / name
    path.unlink()
    os.mkfifo(path)
    assert verify.main([str(copied_run), "--device", "cpu"]) == 2
    assert f"{name} is a pipe: expected a regular file" in capsys.readouterr().err


def test_a_converter_does_not_wait_for_pipes(tmp_path, capsys):
    os.mkfifo(tmp_path / "in.pth")
    assert convert(["encoder", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--to", "copgen"]) == 2
    assert "in.pth is a pipe" in capsys.readouterr().err


def test_a_part_that_is_a_pipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "own.py")
    assert train.main(["quickstart", "--generator.name", str(tmp_path / "own.py"), "--out", str(tmp_path / "run")]) == 2
    assert "own.py: there is no such file" in capsys.readouterr().err


def test_content_is_known_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "weights.bin").write_bytes(b"abc")
    (tmp_path / "b" / ".cache").write_text("not its content")
    first = files.content_digest(tmp_path / "a")
    assert files.content_digest(tmp_path / "b") == first
    shutil.move(tmp_path / "b" / "weights.bin", tmp_path / "b" / "weights.safetensors")
    assert files.content_digest(tmp_path / "b") != first
    assert files.content_digest(tmp_path / "a" / "weights.bin") == files.sha256(tmp_path / "a" / "weights.bin")
