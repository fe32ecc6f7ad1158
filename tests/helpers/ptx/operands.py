"""Operands of PTX instructions as functions of (threads, lanes): values, addresses, and the setting of registers.

`lanes` are the threads that act: their indices, or a slice of all.
"""

from collections.abc import Callable

import numpy as np

from tests.helpers.ptx.arithmetic import DTYPES
from tests.helpers.ptx.parse import Kernel


def register_type(kind: str) -> np.dtype:
    """NumPy's type of a register's bits."""
    return np.dtype(bool if kind == "pred" else f"u{DTYPES[kind].itemsize}")


def reader(kernel: Kernel, operand: str, kind: str) -> Callable:
    """The values of an operand of a type."""
    dtype = DTYPES[kind]
    if operand.startswith("!"):
        inner = reader(kernel, operand[1:], kind)
        return lambda threads, lanes: ~inner(threads, lanes)
    if operand in kernel.registers:
        bits = register_type(kind)
        if register_type(kernel.registers[operand]).itemsize < bits.itemsize:
            raise ValueError(operand)
        return lambda threads, lanes: threads.registers[operand][lanes].astype(bits, copy=False).view(dtype)
    if operand.startswith("%"):
        return lambda threads, lanes: threads.special[operand][lanes].astype(dtype)
    if operand in kernel.symbols:
        number = kernel.symbols[operand]
    elif operand[:2] in ("0f", "0d"):
        number = int(operand[2:], 16)
    else:
        number = int(operand.rstrip("U"), 0)
    constant = np.array(number % (1 << (8 * dtype.itemsize)), register_type(kind)).view(dtype)[()]
    return lambda threads, lanes: constant


def writer(kernel: Kernel, operand: str, kind: str) -> Callable:
    """Sets a register; takes the values, too."""
    if operand == "_":
        return lambda threads, lanes, values: None
    dtype, bits = DTYPES[kind], register_type(kind)
    if register_type(kernel.registers[operand]).itemsize < bits.itemsize:
        raise ValueError(operand)

    def store(threads, lanes, values):
        threads.registers[operand][lanes] = np.asarray(values, dtype).view(bits)

    return store


def readers(kernel: Kernel, operands: str, kind: str) -> Callable:
    """The values of the operands within braces, or of the only one: [lanes, operands]."""
    reads = [reader(kernel, x, kind) for x in listed(operands)]

    def gather(threads, lanes):
        values = np.empty((len(threads.lane[lanes]), len(reads)), DTYPES[kind])
        for i, read in enumerate(reads):
            values[:, i] = read(threads, lanes)
        return values

    return gather


def writers(kernel: Kernel, operands: str, kind: str) -> Callable:
    """Sets the registers within braces, or the only one; takes the values, [lanes, operands], too."""
    stores = [writer(kernel, x, kind) for x in listed(operands)]

    def scatter(threads, lanes, values):
        for i, store in enumerate(stores):
            store(threads, lanes, np.ascontiguousarray(values[:, i]))

    return scatter


def address(kernel: Kernel, operand: str) -> Callable:
    """The addresses that an operand as [%rd1 + 4] means."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    distance = int(offset or "0", 0)
    if base in kernel.registers:
        read = reader(kernel, base, f"u{8 * register_type(kernel.registers[base]).itemsize}")
        return lambda threads, lanes: read(threads, lanes).astype(np.int64) + distance
    place = kernel.symbols[base] + distance
    return lambda threads, lanes: np.full(len(threads.lane[lanes]), place)


def listed(operand: str) -> list[str]:
    """Names within braces, or the only one."""
    return [x.strip() for x in operand.strip("{} ").split(",")]
