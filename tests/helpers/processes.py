"""Child processes of tests, which can be killed: forks of a server that imports the package once for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["copgen_fast.study", "torch.utils.tensorboard", "sklearn.datasets", "tests.conftest"])


class Ended(NamedTuple):
    """How a process ended: its exit code, which is negative for a signal, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Child:
    """A process that calls a function of a module; what that returns is the exit code."""

    def __init__(self, function: Callable[..., int | None], *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.process = SERVER.Process(target=_call, args=(self._folder.name, function, *arguments))
        self.process.start()

    def wait(self, timeout: float = 240) -> Ended:
        """Wait for its end; after `timeout` seconds it is killed."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        with self._folder as folder:
            printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return Ended(self.process.exitcode, *printed)


def run(function: Callable[..., int | None], *arguments: object) -> Ended:
    """Call a function in a process, and wait for its end."""
    return Child(function, *arguments).wait()


def run_ranks(rank_main: Callable[..., int | None], world: int, *arguments: object) -> list[Ended]:
    """Call `rank_main(rank, world, *arguments)` in a process for each rank; all must end well."""
    children = [Child(_one_thread, rank_main, rank, world, *arguments) for rank in range(world)]
    ended = [child.wait() for child in children]
    assert not any(rank.code for rank in ended), "\n".join(rank.stderr for rank in ended)
    return ended


def _one_thread(function: Callable[..., int | None], *arguments: object) -> int | None:
    torch.set_num_threads(1)
    return function(*arguments)


def free_ports(count: int) -> list[str]:
    """Free TCP ports, drawn together so that they differ."""
    with contextlib.ExitStack() as stack:
        drawn = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in drawn:
            free.bind(("127.0.0.1", 0))
        return [str(free.getsockname()[1]) for free in drawn]


def _call(folder: str, function: Callable[..., int | None], *arguments: object) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(Path(folder, stream.name.strip("<>")), os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.exit(function(*arguments))
