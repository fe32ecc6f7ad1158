"""Words between the processes of a run, through a key-value store: arrivals, signs of life, faults.

A collective that waits for a process that is gone knows that somebody is missing, not who. So each process also
signs here, from a thread: what is left of the run can say which rank is missing and where it was, on every backend.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid

import torch.distributed as dist

from copgen_fast.errors import CopgenError

SIGN_EVERY = 0.5
"""Seconds between signs of life."""
SILENCE = 3.0
"""A rank whose sign does not change for so many seconds is gone."""


class LostRankError(CopgenError):
    """Another process of the run stopped, died or hangs; the message names its rank."""


def session(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """A name for these very processes, agreed on by them.

    torchrun's store outlives them and serves those that it starts again, who must not take old words for new ones.

    Raises:
        LostRankError: not all came within `timeout` seconds; the message names those.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        welcomed: set[bytes] = set()
        others = {other: f"arrived/{own}/{other}" for other in range(1, world)}
        while absent := [other for other, key in others.items() if not store.check([key])]:
            for other in absent:
                # It may be the word of a process that is no more; whoever is there has another, and is still absent.
                if store.check([f"hello/{other}"]) and (word := store.get(f"hello/{other}")) not in welcomed:
                    welcomed.add(word)
                    store.set(f"welcome/{word.decode()}", own)
            _expect_time(deadline, f"at the start, after {timeout:g} s: missing ranks {absent}")
        return own
    store.set(f"hello/{rank}", own)
    while not store.check([f"welcome/{own}"]):
        _expect_time(deadline, f"at the start, after {timeout:g} s: rank 0 is missing")
    name = store.get(f"welcome/{own}").decode()
    store.set(f"arrived/{name}/{rank}", "")
    return name


def _expect_time(deadline: float, otherwise: str) -> None:
    if time.monotonic() > deadline:
        raise LostRankError(otherwise)
    time.sleep(0.02)


class Heartbeat:
    """This process's part in the roll call.

    Args:
        store: shared by the processes, and outliving any one of them, as torchrun's does.
        timeout: seconds after which one that is waited for is missing.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._store = store
        self._meeting, self._moves = 0, 0
        self._place, self._moved, self._guarded = "the start", time.monotonic(), False
        self._sign()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._thread.start()

    def mark(self, place: str, guarded: bool = False) -> None:
        """Say where this process is.

        Args:
            guarded: end the process, with a line, should it stay there for 1.5 x timeout: on a GPU the host may wait
                without end for a collective that no exception comes from.
        """
        self._place, self._moved, self._guarded = place, time.monotonic(), guarded
        self._moves += 1

    def barrier(self, place: str, word: str = "", patient: bool = False) -> list[str]:
        """Wait for all ranks; returns the word that each brought, in their order.

        Args:
            patient: wait for as long as those that are missing give signs of life.

        Raises:
            LostRankError: a rank failed, or was not here `timeout` seconds after it last moved.
        """
        self.mark(place)
        meeting = self._meeting
        self._meeting, self._moves = meeting + 1, 0  # all have moved equally far who are here
        keys = [f"meeting {meeting}/{rank}" for rank in range(self.world)]
        try:
            self._store.set(keys[self.rank], word)
            self._await(keys, place, patient)
            words = [value.decode() for value in self._store.multi_get(keys)]
            if meeting >= 2:  # everyone who is at this meeting has left the one before
                self._store.delete_key(f"meeting {meeting - 2}/{self.rank}")
        except dist.DistError as error:
            raise LostRankError(f"at {place}: {_UNREACHABLE} ({str(error).splitlines()[0]})") from error
        return words

    def failed(self, reason: str, cause: bool = True) -> None:
        """Tell the others that this process stops, and why; where even that fails, they will see it silent.

        Args:
            cause: False where it stops because of another rank, which `reason` names.
        """
        try:
            self._store.set(f"{'fault' if cause else 'lost'}/{self.rank}", reason)
            self._store.add("faults", 1)
        except dist.DistError:
            pass

    def missing(self) -> str:
        """Which ranks stopped, give no sign of life or are behind this one; empty when none. Takes seconds."""
        self._guarded = False
        try:
            before, until = self._beats(), time.monotonic() + SILENCE
            while time.monotonic() < until:
                if faults := self._faults():
                    return faults
                self._sign()  # should this be the thread that does
                time.sleep(0.1)
            silent = [rank for rank, beat in enumerate(self._beats()) if beat == before[rank] and rank != self.rank]
            if silent:
                return "; ".join(f"rank {rank} gives no sign of life: {self._last_seen(rank)}" for rank in silent)
            behind = [rank for rank in range(self.world) if self._position(rank) < (self._meeting, self._moves)]
            return "; ".join(f"rank {rank} is still at {self._place_of(rank)}" for rank in behind)
        except dist.DistError:
            return _UNREACHABLE

    def part(self) -> None:
        """The last meeting, which waits for all who live. Rank 0 leaves last: the store may be its process's.

        Raises:
            LostRankError: a rank failed or died.
        """
        self.barrier("the end", patient=True)
        self.close()
        try:
            self._store.set(f"left/{self.rank}", "")
            others, until = [f"left/{rank}" for rank in range(1, self.world)], time.monotonic() + SILENCE
            while self.rank == 0 and not self._store.check(others) and time.monotonic() < until:
                time.sleep(0.01)
        except dist.DistError:
            pass  # they left without a word: it is the end

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _await(self, keys: list[str], place: str, patient: bool) -> None:
        pause, seen, changed = 0.001, None, time.monotonic()
        while not self._store.check(keys):
            if faults := self._faults():
                raise LostRankError(faults)
            absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            beats = self._beats() if patient else []
            signs = [beats[rank] if patient else self._position(rank) for rank in absent]
            if signs != seen:  # whoever comes nearer is waited for
                seen, changed = signs, time.monotonic()
            if time.monotonic() - changed > self.timeout:
                named = "; ".join(f"rank {rank} is missing: {self._last_seen(rank)}" for rank in absent)
                raise LostRankError(f"at {place}, after {self.timeout:g} s: {named}")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _watch(self) -> None:
        while not self._closed.wait(SIGN_EVERY):
            try:
                self._sign()
                stuck = time.monotonic() - self._moved
                # A rank that failed never comes: the others need not wait out the time.
                limit = min(10.0, self.timeout) if self._faults() else 1.5 * self.timeout
            except dist.DistError:
                return
            if self._guarded and stuck > limit:
                self._end(f"stuck at {self._place}")

    def _end(self, how: str) -> None:
        missing = self.missing()
        self.failed(missing or how, cause=not missing)
        why = missing or "the others wait for it"
        # On a line of its own, after a progress bar's.
        print(f"\ncopgen_fast: rank {self.rank}: {how}: {why}", file=sys.stderr, flush=True)
        os._exit(1)

    def _sign(self) -> None:
        self._store.set(f"place/{self.rank}", f"{self._meeting} {self._moves} {self._place}")
        self._store.add(f"beat/{self.rank}", 1)

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.world)]

    def _place_of(self, rank: int) -> str:
        return self._read(f"place/{rank}").partition(" ")[2].partition(" ")[2]

    def _position(self, rank: int) -> tuple[int, ...]:
        """How far a rank is in the run: meetings, and moves since the last."""
        meeting, moves, _ = (self._read(f"place/{rank}") or "-1 0 ").split(" ", 2)
        return int(meeting), int(moves)

    def _last_seen(self, rank: int) -> str:
        place = self._place_of(rank)
        return f"last heard of at {place}" if place else "it never came"

    def _faults(self) -> str:
        """Why others stopped; empty when none did. What was lost by others counts only where nobody gave a cause."""
        if self._store.add("faults", 0) == 0:
            return ""
        others = [rank for rank in range(self.world) if rank != self.rank]
        causes = [f"rank {rank} stopped: {reason}" for rank in others if (reason := self._read(f"fault/{rank}"))]
        return "; ".join(causes) or next(filter(None, (self._read(f"lost/{rank}") for rank in others)), "")

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


_UNREACHABLE = "the store that the processes share does not answer: its host (that of rank 0, or torchrun's) is gone"
