"""Graceful stops: SIGINT and SIGTERM set a flag; stages check it at safe points, save and raise `Interrupted`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from copgen_fast.errors import CopgenError

_requested = threading.Event()


class Interrupted(CopgenError):
    """A signal stopped the run, whose state is saved."""

    exit_code = 130


def stop_requested() -> bool:
    """Whether SIGINT or SIGTERM came within `handle_signals`."""
    return _requested.is_set()


def _request(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C does not wait for the next safe point. A second SIGTERM does: SLURM sends one, torchrun another.
    if _requested.is_set() and signum == signal.SIGINT:
        raise KeyboardInterrupt
    _requested.set()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM set the flag; a SIGINT after that interrupts at once."""
    _requested.clear()
    before = {number: signal.signal(number, _request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()
