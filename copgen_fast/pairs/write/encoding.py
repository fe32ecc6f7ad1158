"""Encodes batches of pairs, here or in worker processes that see the same memory. Needs no torch, so they start fast.

The workers are plain child processes rather than multiprocessing's: those would import the caller's main module, and
wait for ever should it be killed. These read a pipe that closes when the caller is gone, however it went.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

import numpy as np

from copgen_fast.config import Codec
from copgen_fast.errors import CopgenError
from copgen_fast.pairs.codecs import CODECS

Files = list[tuple[bytes, bytes]]
"""Of each pair the anchor's file and the positive's."""

_PAIRS_A_REQUEST = 16
_CHILD = "import sys; sys.path[:] = {path!r}; from copgen_fast.pairs.write.encoding import serve; serve{arguments!r}"


class Encoders:
    """Turns batches of pixels into files, in order.

    Args:
        workers: processes; 0 encodes in this one, as does the codec `raw`, which has nothing to compute.

    Attributes:
        memory: file descriptor of the memory that workers look into: the caller sizes it, maps it and writes pixels
            there. None without workers.
    """

    def __init__(self, codec: Codec, workers: int) -> None:
        self.codec = codec
        self.memory: int | None = None
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        if workers and codec != "raw":
            self.memory = os.memfd_create("copgen_fast pairs")
            self._threads = ThreadPoolExecutor(workers)  # each waits for one worker
            for number in range(workers):
                self._workers.append(_Worker(f"{number + 1} of {workers}", self.memory, codec))
                self._idle.put(self._workers[-1])

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, pixels: np.ndarray, offset: int) -> Callable[[], Files]:
        """Start to encode uint8 [2, n, H, W, 3], anchors first; call the result to have the files.

        Args:
            offset: where the pixels begin in `memory`, in bytes. They must stay as they are until the files are there.

        Raises (from the call):
            CopgenError: a worker died; the message names it.
        """
        rows = range(pixels.shape[1])
        if not self._workers:
            return lambda: _encode(pixels, rows, self.codec)
        chunks = [
            self._threads.submit(self._ask, (offset, pixels.shape, rows[start : start + _PAIRS_A_REQUEST]))
            for start in rows[::_PAIRS_A_REQUEST]
        ]
        return lambda: [pair for chunk in chunks for pair in chunk.result()]

    def _ask(self, request: tuple) -> Files:
        worker = self._idle.get()
        try:
            return worker.encode(request)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()  # they own nothing that could be left half-done
        if self._workers:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._workers = []
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None


class _Worker:
    """A child process that encodes what it is asked to."""

    def __init__(self, name: str, memory: int, codec: Codec) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        with contextlib.closing(theirs):
            code = _CHILD.format(path=sys.path, arguments=(memory, theirs.fileno(), codec))
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(memory, theirs.fileno()),
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                # A Ctrl-C in the terminal is this process's to handle: it ends the workers when it is done.
                start_new_session=True,
            )

    def encode(self, request: tuple) -> Files:
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise CopgenError(
                f"encoding worker {self.name} (process {self.process.pid}) {how}: the shards that are whole are kept; "
                "run the same command to go on, with fewer --pairs.workers if memory was short"
            ) from error

    def close(self) -> None:
        self.process.wait()
        self.connection.close()


def serve(memory: int, connection: int, codec: Codec) -> None:
    """What a worker does: answer requests (offset, shape, rows) from a pipe until it closes.

    Args:
        memory, connection: file descriptors.
    """
    with Connection(connection) as pipe, contextlib.suppress(EOFError, ConnectionError):  # the caller is gone
        for offset, shape, rows in iter(pipe.recv, None):
            # Mapped anew each time, which costs microseconds: before the first batch it has no size.
            with mmap.mmap(memory, 0, access=mmap.ACCESS_READ) as mapped:
                pixels = np.frombuffer(mapped, np.uint8, int(np.prod(shape)), offset).reshape(shape)
                files = _encode(pixels, rows, codec)
                del pixels  # or the map could not be closed
            pipe.send(files)


def _encode(pixels: np.ndarray, rows: range, codec: Codec) -> Files:
    encode = CODECS[codec].encode
    return [(encode(pixels[0, row]), encode(pixels[1, row])) for row in rows]
