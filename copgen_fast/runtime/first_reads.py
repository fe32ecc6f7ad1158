"""Comparison of shards with their digests as they are first read, once for all processes of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


class FirstReads:
    """Compares each shard with its digest before it is first used; threads may share it.

    Args:
        compare: of a shard's number and its bytes, or None where they are not in memory; raises where it is altered.
            None: nothing is compared.
    """

    def __init__(self, compare: Callable[[int, bytes | None], None] | None) -> None:
        self._compare = compare
        self._known: set[int] = set()
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int, data: bytes | None = None) -> None:
        """Compare a shard, unless that is done or another process's part; threads that need it meanwhile wait."""
        if number in self._known or self._compare is None:
            return
        with self._lock:
            lock = self._locks.setdefault(number, threading.Lock())
        with lock:
            if number not in self._known:
                self._compare(number, data)
                self._known.add(number)

    def __reduce__(self) -> tuple:
        return FirstReads, (self._compare,)  # locks can't be sent to a process

    def share(self, numbers: Iterable[int], rank: int, world: int) -> list[int]:
        """This process's part of some shards that `world` of them read; it never compares the others."""
        numbers = set(numbers)
        own = {number for number in numbers if number % world == rank}
        self._known |= numbers - own
        return sorted(own - self._known)
