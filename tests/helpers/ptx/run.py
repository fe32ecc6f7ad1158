"""Runs kernels parsed from PTX: all threads of many blocks at once, an instruction at a time, in NumPy.

Each thread has a place in the code of its own. Of those that can go on, the threads at the lowest place run to the end
of their basic block together; so threads that a branch has parted meet again where compilers let the parts join.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from tests.helpers.ptx import warp
from tests.helpers.ptx.arithmetic import DTYPES, operation
from tests.helpers.ptx.memory import BadAccessError, Global, PerUnit
from tests.helpers.ptx.parse import SIZES, Instruction, Kernel, listed

LANES = 8192
"""Threads that run at once, at most, unless a block has more."""
_DONE = np.iinfo(np.int32).max


class FaultError(Exception):
    """What a GPU would not forgive, or not tell: the message names the instruction and the thread."""


class _Registers(dict):
    """Values by name, made at first use."""

    def __init__(self, kinds, count):
        super().__init__()
        self._kinds, self._count = kinds, count

    def __missing__(self, name):
        kind = self._kinds[name]
        return self.setdefault(name, np.zeros(self._count, bool if kind == "pred" else f"u{SIZES[kind]}"))


class Threads:
    """State of all threads of some blocks."""

    def __init__(self, kernel: Kernel, numbers: np.ndarray, grid: Sequence[int], block: Sequence[int]) -> None:
        self.kernel, self.per_block = kernel, int(np.prod(block))
        self.count = len(numbers) * self.per_block
        self.lane = np.arange(self.count)
        self.registers = _Registers(kernel.registers, self.count)
        self.at, self.waiting = np.zeros(self.count, np.int32), np.zeros(self.count, bool)
        self.copies = warp.Copies(self.count)
        thread, number = self.lane % self.per_block, np.repeat(numbers, self.per_block)
        self.special = {"%laneid": thread % 32, "%warpid": thread // 32}
        for name, flat, shape in (("tid", thread, block), ("ctaid", number, grid)):
            for axis, size in zip("xyz", shape, strict=True):
                self.special[f"%{name}.{axis}"], flat = flat % size, flat // size
                self.special[f"%n{name}.{axis}"] = np.full(self.count, size)

    def fault(self, instruction: Instruction, lane: int, why: str) -> FaultError:
        thread, number = (tuple(int(self.special[f"%{x}.{axis}"][lane]) for axis in "xyz") for x in ("tid", "ctaid"))
        return FaultError(f"{self.kernel.name}: thread {thread} of block {number} {why}: {instruction}")

    @contextlib.contextmanager
    def catching(self, instruction: Instruction, lanes: np.ndarray) -> Iterator[None]:
        """Name the instruction and the thread, among `lanes`, of a bad access within the block."""
        try:
            yield
        except BadAccessError as error:
            raise self.fault(instruction, lanes[error.position], str(error)) from error

    def run(self, program: list) -> None:
        while True:
            able = np.where(self.waiting, _DONE, self.at)
            place = int(able.min())
            if place == _DONE:
                if not self.waiting.any():
                    return
                self._release()
                continue
            here = able == place
            lanes = slice(None) if here.all() else np.flatnonzero(here)
            self.at[lanes] = place + 1 if place + 1 < len(program) else _DONE
            for step in program[place]:
                step(self, lanes)

    def wait(self, lanes: np.ndarray | slice) -> None:
        """Let threads wait at a barrier until all of their block do, or have ended."""
        self.waiting[lanes] = True
        self._release()

    def _release(self):
        waiting, at = (x.reshape(-1, self.per_block) for x in (self.waiting, self.at))
        met = (waiting | (at == _DONE)).all(1) & waiting.any(1)
        apart = waiting & met[:, None] & (at != np.where(waiting, at, 0).max(1, keepdims=True))
        if apart.any():
            lane = int(np.flatnonzero(apart)[0])
            instruction = self.kernel.blocks[self.at[lane] - 1][-1]
            raise self.fault(instruction, lane, "waits here, and others of its block at another barrier")
        waiting[met] = False


def launch(
    kernel: Kernel, grid: Sequence[int], block: Sequence[int], params: bytes, memory: Global, dynamic_shared: int = 0
) -> None:
    """Run a grid; pointers in `params` are addresses of `memory`.

    Raises:
        FaultError: a thread accesses memory that isn't there, reads some that nothing has written, or acts with threads
            that are elsewhere in the code.
        NotImplementedError: an instruction that no kernel of the project had.
    """
    program = _program(kernel)
    number, at_once = int(np.prod(grid)), max(1, LANES // int(np.prod(block)))
    with np.errstate(all="ignore"):
        for first in range(0, number, at_once):
            threads = Threads(kernel, np.arange(first, min(first + at_once, number)), grid, block)
            shared = PerUnit("shared memory", kernel.shared + dynamic_shared, threads.lane // threads.per_block)
            local = PerUnit("local memory", kernel.local, threads.lane)
            threads.spaces = {"global": memory, "shared": shared, "local": local}
            threads.params = params
            threads.run(program)


@functools.cache
def _program(kernel):
    """Functions of the instructions, made once."""
    return [[_step(kernel, x) for x in block] for block in kernel.blocks]


def _step(kernel, instruction):
    try:
        step = _unguarded(kernel, instruction)
    except (LookupError, TypeError, ValueError) as error:
        raise NotImplementedError(f"{kernel.name}: {instruction}") from error

    def guarded(threads, lanes):
        taken = threads.registers[instruction.guard][lanes] != instruction.negated
        if not taken.all():
            lanes = threads.lane[lanes][taken]
        if taken.any():
            step(threads, lanes)

    return guarded if instruction.guard else step


def _unguarded(kernel, instruction):
    name, *rest = instruction.opcode
    operands = instruction.operands
    if name in ("bra", "ret"):
        target = kernel.labels[operands[0]] if operands else _DONE

        def go(threads, lanes):
            threads.at[lanes] = target

        return go
    if name == "bar" and rest == ["sync"] and operands == ("0",):
        return Threads.wait
    if name in ("ld", "st"):
        return _access(kernel, instruction)
    if name in warp.STEPS:
        return warp.STEPS[name](instruction, *(functools.partial(f, kernel) for f in (reader, writer, address)))
    if name == "mov" and "{" in "".join(operands):
        return _repack(kernel, rest[-1], *operands)
    of = operation(("mov", rest[-1]) if name == "cvta" else instruction.opcode, len(operands) - 1)
    inputs = [reader(kernel, x, kind) for x, kind in zip(operands[1:], of.inputs, strict=True)]
    store, compute = writer(kernel, operands[0], of.result), of.compute

    def step(threads, lanes):
        store(threads, lanes, compute(*[read(threads, lanes) for read in inputs]))

    return step


def reader(kernel: Kernel, operand: str, kind: str):
    """Function (threads, lanes) of the values of an operand of a type."""
    dtype = DTYPES[kind]
    if operand.startswith("!"):
        inner = reader(kernel, operand[1:], kind)
        return lambda threads, lanes: ~inner(threads, lanes)
    if operand in kernel.registers:
        size = SIZES[kernel.registers[operand]]
        if size == dtype.itemsize:
            return lambda threads, lanes: threads.registers[operand][lanes].view(dtype)
        if size < dtype.itemsize:
            raise ValueError(operand)
        bits = np.dtype(f"u{dtype.itemsize}")
        return lambda threads, lanes: threads.registers[operand][lanes].astype(bits).view(dtype)
    if operand.startswith("%"):
        return lambda threads, lanes: threads.special[operand][lanes].astype(dtype)
    if operand in kernel.symbols:
        number = kernel.symbols[operand]
    elif operand[:2] in ("0f", "0d"):
        number = int(operand[2:], 16)
    else:
        number = int(operand.rstrip("U"), 0)
    if kind == "pred":
        constant = np.bool_(number != 0)
    else:
        constant = np.array(number % (1 << (8 * dtype.itemsize)), f"u{dtype.itemsize}").view(dtype)[()]
    return lambda threads, lanes: constant


def writer(kernel: Kernel, operand: str, kind: str):
    """Function (threads, lanes, values) that sets a register."""
    if operand == "_":
        return lambda threads, lanes, values: None
    dtype, wide = DTYPES[kind], SIZES[kernel.registers[operand]]
    bits = np.dtype(bool if kind == "pred" else f"u{dtype.itemsize}")
    if wide < dtype.itemsize:
        raise ValueError(operand)

    def store(threads, lanes, values):
        values = np.asarray(values, dtype)
        threads.registers[operand][lanes] = values.view(bits) if wide == dtype.itemsize else values.astype(f"u{wide}")

    return store


def address(kernel: Kernel, operand: str):
    """Function (threads, lanes) of the addresses that an operand as [%rd1 + 4] means."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    distance = int(offset or "0", 0)
    if base in kernel.registers:
        read = reader(kernel, base, f"u{8 * SIZES[kernel.registers[base]]}")
        return lambda threads, lanes: read(threads, lanes).astype(np.int64) + distance
    place = kernel.symbols[base] + distance
    return lambda threads, lanes: np.full(len(threads.lane[lanes]), place)


def _repack(kernel, kind, into, source):
    """mov of registers to the parts of a wider one, or from them."""
    many = listed(into if "{" in into else source)
    part = f"b{8 * SIZES[kind] // len(many)}"
    if "{" in into:
        read, stores = reader(kernel, source, kind), [writer(kernel, x, part) for x in many]

        def unpack(threads, lanes):
            parts = np.ascontiguousarray(read(threads, lanes)).view(DTYPES[part]).reshape(-1, len(many))
            for i, store in enumerate(stores):
                store(threads, lanes, parts[:, i])

        return unpack
    gather, store = _together(kernel, many, part), writer(kernel, into, kind)
    return lambda threads, lanes: store(threads, lanes, gather(threads, lanes).view(DTYPES[kind])[:, 0])


def _together(kernel, operands, kind):
    """Function of the values of several operands, [lanes, operands]."""
    reads = [reader(kernel, x, kind) for x in operands]

    def gather(threads, lanes):
        values = np.empty((len(threads.lane[lanes]), len(reads)), DTYPES[kind])
        for i, read in enumerate(reads):
            values[:, i] = read(threads, lanes)
        return values

    return gather


def _access(kernel, instruction):
    """ld and st."""
    name, space, *rest = instruction.opcode
    space, kind, dtype = space.split("::")[0], rest[-1], DTYPES[rest[-1]]
    into, source = instruction.operands
    if space not in ("param", "global", "shared", "local"):
        raise KeyError(space)
    if name == "st":
        where, gather = address(kernel, into), _together(kernel, listed(source), kind)

        def save(threads, lanes):
            of = threads.lane[lanes]
            with threads.catching(instruction, of):
                threads.spaces[space].write(where(threads, lanes), of, gather(threads, lanes))

        return save
    stores = [writer(kernel, x, kind) for x in listed(into)]
    if space == "param":
        base, _, offset = source.strip("[] ").partition("+")
        at = kernel.params[base] + int(offset or "0", 0)
        return lambda threads, lanes: [
            store(threads, lanes, value)
            for store, value in zip(stores, np.frombuffer(threads.params, dtype, len(stores), at), strict=True)
        ]
    where = address(kernel, source)

    def load(threads, lanes):
        of = threads.lane[lanes]
        with threads.catching(instruction, of):
            values = threads.spaces[space].read(where(threads, lanes), of, dtype, len(stores))
        for i, store in enumerate(stores):
            store(threads, lanes, values[:, i])

    return load
