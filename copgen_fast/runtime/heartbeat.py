"""Heartbeats of a run's ranks in their key-value store, by which a rank that is missing is named on every backend.

A collective that waits for a process that is gone does not say which. torchrun sees a process that dies, but not one
that hangs; gloo's `monitored_barrier` names a rank to rank 0 alone, without where it was, and NCCL has none.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
import uuid
from typing import NamedTuple

import torch.distributed as dist

from copgen_fast.errors import CopgenError

BEAT_EVERY = 0.5
"""Seconds between heartbeats."""
SILENCE = 3.0
"""Seconds without a heartbeat after which a rank is gone."""
_UNREACHABLE = "the store that the processes share does not answer: its host (that of rank 0, or torchrun's) is gone"


class LostRankError(CopgenError):
    """Another process of the run stopped, died or hangs; the message names its rank."""


def session(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """A name agreed on by the processes that run now, for their keys in the store.

    torchrun's store outlives them and serves those that it starts again, who must not read keys of the ones before.
    (TORCHELASTIC_RESTART_COUNT is no such name: after a failure it differs between hosts.)

    Raises:
        LostRankError: not all came within `timeout` seconds; the message names those.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank:
        store.set(f"hello/{rank}", own)
        try:
            store.wait([f"welcome/{own}"], datetime.timedelta(seconds=timeout))
        except dist.DistError as error:
            raise LostRankError(f"at the start, after {timeout:g} s: rank 0 is missing") from error
        name = store.get(f"welcome/{own}").decode()
        store.set(f"arrived/{name}/{rank}", "")
        return name
    while absent := [other for other in range(1, world) if not store.check([f"arrived/{own}/{other}"])]:
        for other in absent:  # a key of a process that is no more is answered, too: the one that runs replaces it
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        if time.monotonic() > deadline:
            raise LostRankError(f"at the start, after {timeout:g} s: missing ranks {absent}")
        time.sleep(0.02)
    return own


class Beat(NamedTuple):
    """A heartbeat: its number, the rank's barriers so far, its marks since the last of them, and where it is."""

    number: int
    barriers: int
    marks: int
    location: str

    def is_behind(self, other: Beat) -> bool:
        return (self.barriers, self.marks) < (other.barriers, other.marks)

    def last_seen(self) -> str:
        return f"last heard of at {self.location}" if self.location else "it never came"


class Heartbeat:
    """This process's heartbeat, sent by a thread, and what those of the other ranks say.

    Args:
        store: shared by the processes, and outliving any one of them, as torchrun's does.
        timeout: seconds after which a rank that is waited for is missing.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._store, self._closed = store, threading.Event()
        self._others = [other for other in range(world) if other != rank]
        self._own, self._since, self._watchdog = Beat(0, 0, 0, "the start"), time.monotonic(), False
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, location: str, watchdog: bool = False) -> None:
        """Record where this process is.

        Args:
            watchdog: end the process, with a line, should it stay there for 1.5 x timeout: on a GPU the host may wait
                without end for a collective that raises nothing.
        """
        self._own = self._own._replace(marks=self._own.marks + 1, location=location)
        self._since, self._watchdog = time.monotonic(), watchdog

    def barrier(self, location: str, message: str = "", while_alive: bool = False) -> list[str]:
        """Wait for all ranks; returns the message of each, in their order.

        Args:
            while_alive: wait for a rank as long as it has a heartbeat, not `timeout` seconds after its last `mark`.

        Raises:
            LostRankError: a rank failed or did not come; the message names it.
        """
        number = self._own.barriers
        self.mark(location)
        self._own = self._own._replace(barriers=number + 1, marks=0)
        keys = [f"barrier {number}/{rank}" for rank in range(self.world)]
        pause, seen, changed = 0.001, None, time.monotonic()
        try:
            self._store.set(keys[self.rank], message)
            while not self._store.check(keys):
                # Read before the keys: a rank that failed after this barrier had come to it first.
                if (faults := self._faults()) and not self._store.check(keys):
                    raise LostRankError(faults)
                absent = {rank: self._read(rank) for rank, key in enumerate(keys) if not self._store.check([key])}
                signs = [beat if while_alive else beat[1:] for beat in absent.values()]
                if signs != seen:
                    seen, changed = signs, time.monotonic()
                if time.monotonic() - changed > self.timeout:
                    named = "; ".join(f"rank {rank} is missing: {beat.last_seen()}" for rank, beat in absent.items())
                    raise LostRankError(f"at {location}, after {self.timeout:g} s: {named}")
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            messages = [value.decode() for value in self._store.multi_get(keys)]
            if number >= 2:  # all who are at this barrier have left the one before
                self._store.delete_key(f"barrier {number - 2}/{self.rank}")
        except dist.DistError as error:
            raise LostRankError(f"at {location}: {_UNREACHABLE} ({str(error).splitlines()[0]})") from error
        return messages

    def failed(self, reason: str, cause: bool = True) -> None:
        """Tell the others that this process stops, and why; where even that fails, they will see it silent.

        Args:
            cause: False where it stops because of another rank, which `reason` names.
        """
        with contextlib.suppress(dist.DistError):
            self._store.set(f"{'fault' if cause else 'lost'}/{self.rank}", reason)
            self._store.set("faults", "")

    def missing(self) -> str:
        """Which ranks stopped, have no heartbeat or are behind this one; empty when none. Takes `SILENCE` seconds."""
        self._watchdog = False
        try:
            before, until = [self._read(rank) for rank in self._others], time.monotonic() + SILENCE
            while time.monotonic() < until:
                if faults := self._faults():
                    return faults
                self._beat()  # should this be the thread that does
                time.sleep(0.1)
            now = {rank: self._read(rank) for rank in self._others}
        except dist.DistError:
            return _UNREACHABLE
        silent = [rank for old, (rank, beat) in zip(before, now.items(), strict=True) if beat == old]
        behind = [rank for rank, beat in now.items() if beat.is_behind(self._own)]
        named = [f"rank {rank} gives no sign of life: {now[rank].last_seen()}" for rank in silent]
        return "; ".join(named or [f"rank {rank} is still at {now[rank].location}" for rank in behind])

    def close(self) -> None:
        """Stop the heartbeat. Rank 0 waits for the others to do so: the store may be its process's."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self._store.wait([f"left/{rank}" for rank in self._others], datetime.timedelta(seconds=SILENCE))

    def _run(self) -> None:
        while not self._closed.wait(BEAT_EVERY):
            try:
                self._beat()
                # A rank that failed never comes: the others need not wait out the time.
                limit = min(10.0, self.timeout) if self._faults() else 1.5 * self.timeout
            except dist.DistError:
                return
            if self._watchdog and time.monotonic() - self._since > limit:
                how, missing = f"stuck at {self._own.location}", self.missing()
                self.failed(missing or how, cause=not missing)
                why = missing or "the others wait for it"
                # On a new line, after a progress bar's.
                print(f"\ncopgen_fast: rank {self.rank}: {how}: {why}", file=sys.stderr, flush=True)
                os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", " ".join(map(str, self._own._replace(number=self._beats))))

    def _read(self, rank: int) -> Beat:
        number, barriers, marks, location = (self._get(f"beat/{rank}") or "0 -1 0 ").split(" ", 3)
        return Beat(int(number), int(barriers), int(marks), location)

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _faults(self) -> str:
        """Why others stopped; empty when none did. What others lost counts only where none gave a cause."""
        if not self._store.check(["faults"]):
            return ""
        causes = [f"rank {rank} stopped: {reason}" for rank in self._others if (reason := self._get(f"fault/{rank}"))]
        return "; ".join(causes) or next(filter(None, (self._get(f"lost/{rank}") for rank in self._others)), "")
