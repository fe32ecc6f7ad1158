"""How commands end: one line and an exit code, whatever happened that a user can act on."""

import errno
import importlib
import io
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from copgen_fast import errors, train
from copgen_fast.errors import CopgenError, CorruptArtifactError, ExhaustedError, UsageError
from copgen_fast.images import pack
from copgen_fast.stages import navigator
from tests.conftest import TINY
from tests.helpers import processes

COMMANDS = [
    *("bench", "bench.compile.kernels", "bench.compile.cuda_kernels", "copgen_fast.convert", "copgen_fast.doctor"),
    *(f"copgen_fast.generators.fit.{name}" for name in ("digits", "residual_flow", "resnet_gan")),
    *("copgen_fast.pairs.merge", "copgen_fast.train", "copgen_fast.verify"),
]


def main_of(command):
    package = command in ("bench", "copgen_fast.convert", "copgen_fast.doctor")
    return importlib.import_module(f"{command}.__main__" if package else command).main


def raising(error):
    """A command that ends in this error."""

    @errors.command
    def main(arguments=None):
        raise error

    return main


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("too small: take more"), 2, "too small: take more"),
        (MemoryError(), 1, "out of memory: free some"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2000000 bytes."),
            1,
            "out of memory, 2 MB more were needed: free some",
        ),
        (RuntimeError("std::bad_alloc"), 1, "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has"), 1, "out of memory. Tried 2 GiB: "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory"),
        (caused(CorruptArtifactError("it is damaged"), MemoryError()), 1, "out of memory"),
        (caused(UsageError("it is in use"), BlockingIOError(errno.EAGAIN, "busy")), 2, "it is in use"),
        (ExhaustedError("pairs: out of memory: choose less"), 1, "pairs: out of memory: choose less"),
        (RuntimeError("can't start new thread"), 1, "no thread or process could be started"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 1, "no thread or process could be started"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.pt"), 1, "No such file or directory: a.pt"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_act_on_is_one_line(error, code, line, capsys):
    assert raising(error)([]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("copgen_fast: ") and line in said


@pytest.mark.parametrize("error", [ValueError("a fault of the program"), ZeroDivisionError(), OSError("no number")])
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)):
        raising(error)([])


def test_arrays_too_large_for_memory_are_known_by_numpys_words_too():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, np.uint8)
    assert errors.exhausted(caught.value).startswith("out of memory (Unable to allocate")


def test_a_warning_is_one_line(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / "cat" / "a.png")
    ended = processes.run(pack.main, [str(tmp_path / "images"), str(tmp_path / "out")])
    first = ended.stderr.splitlines()[0]
    assert ended.code == 0 and first == f"warning: {tmp_path / 'images'} has no test, so val is taken as test"
    assert "named(" not in ended.stderr


def test_the_line_names_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    raising(CopgenError("lost"))([])
    assert capsys.readouterr().err == "copgen_fast: rank 1: lost\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_into_a_pipe_that_is_closed_ends_quietly(command, monkeypatch, capfd):
    main, (read, write) = main_of(command), os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--help"]) == 141
    assert capfd.readouterr().err == ""


def test_a_run_whose_reader_leaves_says_that_it_stops(tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 1
    assert re.fullmatch("copgen_fast: what read the output has closed it: stopped; .*\n", capsys.readouterr().err)


def test_names_that_the_terminal_cannot_show_are_escaped(finished_run, tmp_path, monkeypatch):
    folder = tmp_path / "été"
    shutil.copytree(finished_run, folder)
    for command, arguments in (
        ("copgen_fast.train", [*TINY, "--stages", "report", "--out", str(folder)]),
        ("copgen_fast.pairs.merge", [str(folder / "pairs" / "identity")]),
    ):
        ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", ascii_only)
        assert main_of(command)(arguments) == 0
        assert rb"\xe9t\xe9" in ascii_only.buffer.getvalue()


@pytest.mark.parametrize("out", ["/dev/null", "n" * 300, "a\0b", "/"])
def test_what_can_be_no_run_folder_is_refused(out, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for main, arguments in ((train.main, [*TINY, "--out", out]), (main_of("copgen_fast.verify"), [out])):
        assert main(arguments) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_memory_that_ends_in_a_stage_keeps_what_was_saved(finished_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)

    def full(run):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(navigator, "run", full)
    assert train.main([*TINY, "--out", str(folder)]) == 1
    assert re.match("copgen_fast: navigator: out of memory.*: --generator.checkpoint", capsys.readouterr().err)
    monkeypatch.undo()
    assert train.main([*TINY, "--out", str(folder)]) == 0


@pytest.mark.parametrize("stage", ["navigator", "pairs", "pretrain"])
def test_a_run_folder_deleted_meanwhile_is_said(stage, finished_run, tmp_path, monkeypatch, capsys):
    folder, work = tmp_path / "run", importlib.import_module(f"copgen_fast.stages.{stage}")
    if stage != "navigator":
        shutil.copytree(finished_run, folder)
        shutil.rmtree(folder / stage)
        shutil.rmtree(folder / "probe")
    name = {"navigator": "alternating_step", "pairs": "open_source", "pretrain": "pretrain_step"}[stage]
    done = getattr(work, name)

    def deleted(*arguments):
        result = done(*arguments)
        shutil.rmtree(folder, ignore_errors=True)
        return result

    monkeypatch.setattr(work, name, deleted)
    assert train.main([*TINY, "--out", str(folder), "--stages", stage]) == 1
    assert f"{folder} was deleted or moved while the run wrote into it" in capsys.readouterr().err.splitlines()[-1]
