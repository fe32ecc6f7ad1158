"""Reading of shards that are compared with their digests as they are first read, once for all readers of a run.

A shard counts as compared while its inode, size and time of change are those that it had then. Once one of them differs
it is compared again: what was altered, cut short or removed meanwhile is found before it is used, and what was only
copied or touched is read on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence

Shard = tuple[str, str]
"""Path and SHA-256 (hex)."""
Stamp = tuple[int, int, int, int]
"""Device, inode, size in bytes and time of change in ns."""

_compared: dict[Shard, Stamp] = {}
"""By any reader of this process."""
_left: dict[Shard, Stamp | None] = {}
"""To other processes of the run, as they were when this one first saw them."""
_locks: dict[Shard, threading.Lock] = {}
os.register_at_fork(after_in_child=_locks.clear)  # the threads that hold them are not there


class FirstReads:
    """Reads shards, each compared with its digest before it is first used, and again where it has changed since.

    Threads may share it. Other readers of the same shards, here and in processes that this one is sent to, don't
    compare again what was compared before.

    Args:
        shards: path and digest of each, by number.
        compare: of a shard's number and its bytes, or None where they are not in memory; raises where the shard is
            missing or altered.
        trusting: take shards as they are when they are first read, and compare those alone that change afterwards.
    """

    def __init__(
        self, shards: Sequence[Shard], compare: Callable[[int, bytes | None], None], trusting: bool = False
    ) -> None:
        self._shards, self._compare, self._trusting = shards, compare, trusting
        self._trusted: dict[int, Stamp] = {}

    def compare(self, number: int, data: bytes | None = None, stamp: Stamp | None = None) -> None:
        """Compare a shard, unless that is done; threads that need it meanwhile wait.

        Args:
            data: its bytes, where they are in memory, and its stamp when they were read.
        """
        shard = self._shards[number]
        with _locks.setdefault(shard, threading.Lock()):
            stamp = stamp or self._now(number)  # before comparing, so that a change meanwhile shows
            if stamp is None or _compared.get(shard) != stamp:
                self._compare(number, data)
                _compared[shard] = stamp

    def expect(self, number: int) -> None:
        """`compare`, unless another process does or shards are trusted."""
        if not self._known(number, self._now(number)):
            self.compare(number)

    def read(self, number: int, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a shard, or all, which are compared themselves, so that the file is read once."""
        try:
            data, stamp = self._read(number, offset, size)
        except OSError:
            data, stamp = None, None  # comparing says what is wrong
        if not self._known(number, stamp):
            if size is None and stamp is not None:
                self.compare(number, data, stamp)
            else:
                self.compare(number)
                data, _ = self._read(number, offset, size)
        return data

    def share(self, numbers: Iterable[int], rank: int, world: int) -> list[int]:
        """This process's part of some shards that `world` of them read, without those compared before.

        It leaves the others' to them.
        """
        numbers = set(numbers)
        own = {number for number in numbers if number % world == rank}
        for number in numbers - own:
            if self._shards[number] not in _left:
                _left[self._shards[number]] = self._now(number)
        return sorted(number for number in own if self._shards[number] not in _compared)

    def __getstate__(self) -> dict:
        compared = {number: _compared[shard] for number, shard in enumerate(self._shards) if shard in _compared}
        return self.__dict__ | {"_trusted": self._trusted | compared}

    def _known(self, number: int, stamp: Stamp | None) -> bool:
        if stamp is None:
            return False
        if self._trusting:
            self._trusted.setdefault(number, stamp)
        shard = self._shards[number]
        return stamp in (_compared.get(shard), _left.get(shard), self._trusted.get(number))

    def _now(self, number: int) -> Stamp | None:
        """None: it can't be read."""
        try:
            return _stamp(os.stat(self._shards[number][0]))
        except OSError:
            return None

    def _read(self, number: int, offset: int, size: int | None) -> tuple[bytes, Stamp]:
        # Opened anew each time: thousands of shards would pass the limit on open files.
        if size is None:
            with open(self._shards[number][0], "rb", buffering=0) as file:
                return file.read(), _stamp(os.fstat(file.fileno()))  # after reading, so that a change meanwhile shows
        file = os.open(self._shards[number][0], os.O_RDONLY | os.O_CLOEXEC)  # in two thirds of the time of `open`
        try:
            return os.pread(file, size, offset), _stamp(os.fstat(file))
        finally:
            os.close(file)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
