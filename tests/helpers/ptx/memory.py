"""Memory that knows which of its bytes exist, which were written, and which threads use them at the same time."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

SHIFT = 40
WIDEST = 32
"""Bytes of the widest access, of which every array of bytes is a multiple."""
PERIOD = 1 << 20
"""Users of memory have numbers; those of the same period act in no order. Its last number stands for several users."""
NEVER, BEFORE = -1, -2
"""In place of a user's number: no thread has used these bytes; they were set before the kernel began."""
_SEVERAL = PERIOD - 1


def room(pointer: int, size: int) -> tuple[int, int]:
    """Bytes before `size` bytes at `pointer`, and of all, from a multiple of WIDEST to a multiple of it."""
    before = pointer % WIDEST
    return before, before + size + -(before + size) % WIDEST


def users(length: int, at_first: int) -> np.ndarray:
    """The last reader and the last writer of each byte: [2, length]."""
    return np.full((2, length), at_first, np.int32)


class BadAccessError(Exception):
    """A thread's number, and what it may not do."""


@dataclass
class Bytes:
    """Bytes [start, end) of `data`; where every `sharing` threads have their own, these are `stride` apart."""

    name: str
    data: np.ndarray
    users: np.ndarray
    start: int
    end: int
    exists: np.ndarray | None = None  # flags of bytes; None: all
    sharing: int = 1
    stride: int = 0
    who: np.ndarray | None = None
    """The number of each thread as a user."""

    def read(self, at: np.ndarray, lanes: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` numbers at each of the offsets `at`, [len(at), count]."""
        size = dtype.itemsize * count
        rows, (readers, writers), who = self._find(at, lanes, size)
        last = writers[rows]
        _refuse(lanes, last == NEVER, lambda: f"reads bytes of {self.name} that nothing has written")
        _refuse(lanes, _others(last, who), lambda: f"reads bytes of {self.name} that another may write later")
        _note(readers, rows, who)
        return self.data.view(dtype).reshape(-1, count)[rows]

    def write(self, at: np.ndarray, lanes: np.ndarray, values: np.ndarray, pending: bool = False) -> None:
        """Write the rows of `values` at the offsets `at`; in the place of `pending` ones something else comes later."""
        new = values.view(np.uint8)
        rows, (readers, writers), who = self._find(at, lanes, new.shape[1])
        data = self.data.reshape(-1, new.shape[1])
        # Several may write alike: layouts have copies. Who reads beside them relies on an order, whatever they write.
        used = _others(readers[rows], who) | _others(writers[rows], who) & (data[rows] != new)
        _refuse(lanes, used, lambda: f"changes bytes of {self.name} that another uses at the same time")
        data[rows] = new
        _refuse(lanes, data[rows] != new, lambda: f"writes bytes of {self.name} where another writes something else")
        _note(writers, rows, who)
        if pending:
            writers[rows] = NEVER

    def _find(self, at, lanes, size):
        """Rows of `size` bytes at offsets, the last users of all rows, and these threads' numbers as users."""
        outside = (at < self.start) | (at + size > self.end)

        def where():
            first = int(at[outside][0])
            far = f"{self.start - first} bytes before" if first < self.start else f"{first - self.end} bytes beyond"
            return f"accesses {size} bytes {far} {self.name} of {self.end - self.start} bytes"

        _refuse(lanes, outside, where)
        _refuse(lanes, at % size != 0, lambda: f"accesses {size} bytes of {self.name} at no multiple of {size}")
        rows = (at + lanes // self.sharing * self.stride) // size
        if self.exists is not None:
            between = ~self.exists.reshape(-1, size)[rows]
            _refuse(lanes, between, lambda: f"accesses memory between the elements of {self.name}")
        return rows, self.users.reshape(2, -1, size), self.who[lanes][:, None]


def _refuse(lanes, wrong, why):
    if wrong.any():
        raise BadAccessError(int(lanes[wrong.reshape(len(lanes), -1).any(1)][0]), why())


def _others(last, who):
    """Whether those that used bytes last are others, who act in no order with these."""
    return (last | _SEVERAL == who | _SEVERAL) & (last != who)


def _note(last, rows, who):
    """Put down who uses rows of bytes."""
    several = _others(last[rows], who)
    last[rows] = who
    row, byte = np.nonzero(several | (last[rows] != who))
    last[rows[row], byte] = who[row, 0] | _SEVERAL


def own(name: str, size: int, sharing: int, who: np.ndarray) -> Bytes:
    """`size` bytes for every `sharing` of the threads that are users with these numbers; nothing is written yet."""
    stride = room(1, size)[1]
    length = len(who) // sharing * stride
    return Bytes(name, np.zeros(length, np.uint8), users(length, NEVER), 0, size, None, sharing, stride, who)


class Global:
    """Tensors' memory, at addresses so far apart that none is reached from another.

    An address is the number of a tensor, times 2^40, and the lowest bits of where its memory really is.
    """

    def __init__(self) -> None:
        self._regions: list[Bytes] = []
        self.storages: dict[int, np.ndarray] = {}  # last users of the bytes of what tensors share
        self.launches, self.who = 0, np.zeros(0, np.int32)

    def add(self, name: str, pointer: int, size: int, exists: np.ndarray | None, last: np.ndarray) -> int:
        """Address for kernels of `size` bytes at `pointer`, of which these exist and had these last users."""
        before, length = room(pointer, size)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(pointer - before))
        self._regions.append(Bytes(name, data, last, before, before + size, exists))
        return (len(self._regions) << SHIFT) + before

    def read(self, at: np.ndarray, lanes: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        found = np.empty((len(at), count), dtype)
        for chosen, region, offsets in self._by_region(at, lanes):
            found[chosen] = region.read(offsets, lanes[chosen], dtype, count)
        return found

    def write(self, at: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        for chosen, region, offsets in self._by_region(at, lanes):
            region.write(offsets, lanes[chosen], values[chosen])

    def _by_region(self, at, lanes):
        # A little before a tensor's first byte is nearer to it than to the one before.
        numbers = (at + (1 << (SHIFT - 1))) >> SHIFT
        unknown = (numbers < 1) | (numbers > len(self._regions))
        _refuse(lanes, unknown, lambda: f"accesses address {int(at[unknown][0]):#x}, which no tensor has")
        for number in numbers[:1] if (numbers == numbers[:1]).all() else np.unique(numbers):
            chosen, region = numbers == number, self._regions[number - 1]
            region.who = self.who
            yield chosen, region, at[chosen] - (int(number) << SHIFT)
