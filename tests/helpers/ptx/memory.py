"""Memory that knows which of its bytes exist and which were written."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

SHIFT = 40
WIDEST = 32
"""Bytes of the widest access, of which every array of bytes is a multiple."""


def room(pointer: int, size: int) -> tuple[int, int]:
    """Bytes before `size` bytes at `pointer`, and of all, from a multiple of WIDEST to a multiple of it."""
    before = pointer % WIDEST
    return before, before + size + -(before + size) % WIDEST


class BadAccessError(Exception):
    """An access that no thread may make, and the thread: one of `lanes`, which access, that is `wrong`."""

    def __init__(self, lanes: np.ndarray, wrong: np.ndarray, why: str) -> None:
        super().__init__(why)
        self.lane = int(lanes[wrong][0])


@dataclass
class Bytes:
    """Bytes [start, end) of `data`, and flags of each that exists and that was written (None: all)."""

    name: str
    data: np.ndarray
    start: int
    end: int
    exists: np.ndarray | None = None
    written: np.ndarray | None = None

    def read(self, at: np.ndarray, lanes: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` numbers at each of the offsets `at`, [len(at), count]."""
        size = dtype.itemsize * count
        rows = self._rows(at, lanes, size)
        if self.written is not None:
            unwritten = ~self.written.reshape(-1, size)[rows].all(1)
            _refuse(lanes, unwritten, lambda: f"reads bytes of {self.name} that nothing has written")
        return self.data.view(dtype).reshape(-1, count)[rows]

    def write(self, at: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        """Write the rows of `values` at the offsets `at`."""
        size = values.itemsize * values.shape[1]
        rows = self._rows(at, lanes, size)
        self.data.view(values.dtype).reshape(-1, values.shape[1])[rows] = values
        if self.written is not None:
            self.written.reshape(-1, size)[rows] = True

    def _rows(self, at, lanes, size):
        outside = (at < self.start) | (at + size > self.end)

        def where():
            first = int(at[outside][0])
            far = f"{self.start - first} bytes before" if first < self.start else f"{first - self.end} bytes beyond"
            return f"accesses {size} bytes {far} {self.name} of {self.end - self.start} bytes"

        _refuse(lanes, outside, where)
        _refuse(lanes, at % size != 0, lambda: f"accesses {size} bytes of {self.name} at no multiple of {size}")
        rows = at // size
        if self.exists is not None:
            between = ~self.exists.reshape(-1, size)[rows].all(1)
            _refuse(lanes, between, lambda: f"accesses memory between the elements of {self.name}")
        return rows


def _refuse(lanes, wrong, why):
    if wrong.any():
        raise BadAccessError(lanes, wrong, why())


class Own:
    """Memory of each block or thread, of `size` bytes; reads of what is not yet written are refused."""

    def __init__(self, name: str, size: int, owners: int, threads: int) -> None:
        self._size, self._threads = size, threads
        self._stride = size + -size % WIDEST
        flags = np.zeros(owners * self._stride, bool)
        self._bytes = Bytes(name, np.zeros(len(flags), np.uint8), 0, len(flags), None, flags)

    def read(self, at: np.ndarray, lanes: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        return self._bytes.read(self._place(at, lanes, dtype.itemsize * count), lanes, dtype, count)

    def write(self, at: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        self._bytes.write(self._place(at, lanes, values.itemsize * values.shape[1]), lanes, values)

    def _place(self, at, lanes, size):
        outside = (at < 0) | (at + size > self._size)
        why = "accesses {} bytes at {} of the {} bytes of {}"
        _refuse(lanes, outside, lambda: why.format(size, int(at[outside][0]), self._size, self._bytes.name))
        return lanes // self._threads * self._stride + at


class Global:
    """Tensors' memory, at addresses so far apart that none is reached from another.

    An address is the number of a tensor, times 2^40, and the lowest bits of where its memory really is.
    """

    def __init__(self) -> None:
        self._regions: list[Bytes] = []

    def add(self, name: str, pointer: int, size: int, exists=None, written=None) -> int:
        """Address for kernels of `size` bytes at `pointer`, with flags per byte of which exist and were written."""
        before, length = room(pointer, size)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(pointer - before))
        self._regions.append(Bytes(name, data, before, before + size, exists, written))
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
        if not len(at):
            return
        # A little before a tensor's first byte is nearer to it than to the one before.
        numbers = (at + (1 << (SHIFT - 1))) >> SHIFT
        unknown = (numbers < 1) | (numbers > len(self._regions))
        _refuse(lanes, unknown, lambda: f"accesses address {int(at[unknown][0]):#x}, which no tensor has")
        for number in numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers):
            chosen = numbers == number
            yield chosen, self._regions[number - 1], at[chosen] - (int(number) << SHIFT)
