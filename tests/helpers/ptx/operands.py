"""Operands of PTX instructions as functions of (threads, lanes): values, addresses, and the setting of registers.

`lanes` are the threads that act: their indices, or a slice of all. Values are [lanes, operands]: an operand is a
register, or several within braces.
"""

from collections.abc import Callable

import numpy as np

from tests.helpers.ptx.arithmetic import BITS, DTYPES
from tests.helpers.ptx.parse import Kernel


def listed(operand: str) -> list[str]:
    """Names within braces, or the only one."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


def reader(kernel: Kernel, operand: str, kind: str) -> Callable:
    """The values of an operand of a type."""
    reads = [_reader_of_one(kernel, x, kind) for x in listed(operand)]

    def read(threads, lanes):
        values = np.empty((len(threads.lane[lanes]), len(reads)), DTYPES[kind])
        for i, read_one in enumerate(reads):
            values[:, i] = read_one(threads, lanes)
        return values

    return read


def _reader_of_one(kernel, operand, kind):
    dtype, bits = DTYPES[kind], BITS[kind]
    if operand.startswith("!"):
        inner = _reader_of_one(kernel, operand[1:], kind)
        return lambda threads, lanes: ~inner(threads, lanes)
    if operand in kernel.registers:
        if kernel.registers[operand].itemsize < bits.itemsize:
            raise ValueError(operand)
        return lambda threads, lanes: threads.registers[operand][lanes].astype(bits, copy=False).view(dtype)
    if operand.startswith("%"):
        return lambda threads, lanes: threads.special[operand][lanes]
    if operand in kernel.symbols:
        number = kernel.symbols[operand]
    elif operand[:2] in ("0f", "0d"):
        number = int(operand[2:], 16)
    else:
        number = int(operand.rstrip("U"), 0)
    constant = np.array(number % (1 << (8 * dtype.itemsize)), bits).view(dtype)
    return lambda threads, lanes: constant


def writer(kernel: Kernel, operand: str) -> Callable:
    """Sets registers; takes the values, too. In a wider register negative integers stay what they are."""
    names = listed(operand)
    sizes = {name: kernel.registers[name].itemsize for name in names if name != "_"}

    def write(threads, lanes, values):
        bits = values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values
        for name, column in zip(names, bits.T, strict=True):
            if name in sizes:
                if sizes[name] < bits.itemsize:
                    raise TypeError(f"{kernel.name}: {name} is set to numbers of {bits.itemsize} bytes")
                threads.registers[name][lanes] = column

    return write


def address(kernel: Kernel, operand: str) -> Callable:
    """The addresses [lanes] that an operand as [%rd1 + 4] means."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    size, distance = 8 if base in kernel.symbols else kernel.registers[base].itemsize, int(offset or "0", 0)
    read = reader(kernel, base, f"b{8 * size}")
    return lambda threads, lanes: read(threads, lanes)[:, 0].astype(np.int64) + distance
