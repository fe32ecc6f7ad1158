"""Runs kernels parsed from PTX: all threads of many blocks at once, an instruction at a time, in NumPy.

Each thread has a place in the code of its own. Of those that can go on, the threads at the lowest place run to the end
of their basic block together; so threads that a branch has parted meet again where compilers let the parts join.
"""

import functools
from collections.abc import Sequence

import numpy as np

from tests.helpers.ptx import warp
from tests.helpers.ptx.arithmetic import DTYPES, operation
from tests.helpers.ptx.memory import BEFORE, PERIOD, BadAccessError, Bytes, Global, own, room, users
from tests.helpers.ptx.operands import address, listed, reader, writer
from tests.helpers.ptx.parse import Instruction, Kernel

LANES = 8192
"""Threads that run at once, at most, unless a block has more."""
_DONE = np.iinfo(np.int32).max


class FaultError(Exception):
    """What a GPU would not forgive, or not tell: the message names the instruction and the thread."""


class Threads:
    """State of all threads of some blocks."""

    def __init__(self, kernel: Kernel, numbers: np.ndarray, grid: Sequence[int], block: Sequence[int]) -> None:
        self.kernel, self.per_block = kernel, int(np.prod(block))
        self.count = len(numbers) * self.per_block
        self.lane = np.arange(self.count)
        # All bits are set at first: NaN, or an index that nothing has.
        self.registers = {name: ~np.zeros(self.count, bits) for name, bits in kernel.registers.items()}
        self.at, self.waiting = np.zeros(self.count, np.int32), np.zeros(self.count, bool)
        self.copies = warp.Copies(self.count)
        thread, number = self.lane % self.per_block, np.repeat(numbers, self.per_block)
        # As users of memory: threads, from one barrier of their block to the next, and blocks.
        self.user, self.block = self.lane.astype(np.int32), number.astype(np.int32)
        self.special = {"%laneid": thread % 32, "%warpid": thread // 32}
        for name, flat, shape in (("tid", thread, block), ("ctaid", number, grid)):
            for axis, size in zip("xyz", shape, strict=True):
                self.special[f"%{name}.{axis}"], flat = flat % size, flat // size
                self.special[f"%n{name}.{axis}"] = np.full(self.count, size)

    def fault(self, instruction: Instruction, lane: int, why: str) -> FaultError:
        thread, number = (tuple(int(self.special[f"%{x}.{axis}"][lane]) for axis in "xyz") for x in ("tid", "ctaid"))
        return FaultError(f"{self.kernel.name}: thread {thread} of block {number} {why}: {instruction}")

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
        """Let threads wait at a barrier until all have come to one, or have ended."""
        self.waiting[lanes] = True

    def _release(self):
        waiting, at = (x.reshape(-1, self.per_block) for x in (self.waiting, self.at))
        apart = waiting & (at != np.where(waiting, at, 0).max(1, keepdims=True))
        if apart.any():
            lane = int(np.flatnonzero(apart)[0])
            instruction = self.kernel.blocks[self.at[lane] - 1][-1]
            raise self.fault(instruction, lane, "waits here, and others of its block at another barrier")
        self.waiting[:] = False
        self.user += PERIOD


def launch(
    kernel: Kernel, grid: Sequence[int], block: Sequence[int], params: bytes, memory: Global, dynamic_shared: int = 0
) -> None:
    """Run a grid; pointers in `params` are addresses of `memory`.

    Raises:
        FaultError: a thread accesses memory that isn't there, reads some that nothing has written, changes some that
            another uses at the same time, or acts with threads that are elsewhere in the code.
        NotImplementedError: an instruction that no kernel of the project had.
    """
    program = _program(kernel)
    content = np.frombuffer(params.ljust(room(0, len(params))[1]), np.uint8)
    given = Bytes("the parameters", content, users(len(content), BEFORE), 0, len(params))
    number, at_once = int(np.prod(grid)), max(1, LANES // int(np.prod(block)))
    memory.launches += 1
    with np.errstate(all="ignore"):
        for first in range(0, number, at_once):
            threads = Threads(kernel, np.arange(first, min(first + at_once, number)), grid, block)
            of_block, of_thread = kernel.sizes["shared"] + dynamic_shared, kernel.sizes["local"]
            shared = own("shared memory", of_block, threads.per_block, threads.user)
            local = own("local memory", of_thread, 1, threads.lane)
            given.who, memory.who = threads.lane, threads.block + PERIOD * memory.launches
            threads.spaces = {"param": given, "global": memory, "shared": shared, "local": local}
            threads.run(program)


@functools.cache
def _program(kernel):
    """Functions of the instructions, made once."""
    return [[_step(kernel, x) for x in block] for block in kernel.blocks]


def _step(kernel, instruction):
    try:
        unguarded = _unguarded(kernel, instruction)
    except (LookupError, TypeError, ValueError) as error:
        raise NotImplementedError(f"{kernel.name}: {instruction}") from error

    def step(threads, lanes):
        if instruction.guard:
            taken = threads.registers[instruction.guard][lanes] != instruction.negated
            if not taken.any():
                return
            if not taken.all():
                lanes = threads.lane[lanes][taken]
        try:
            unguarded(threads, lanes)
        except BadAccessError as error:
            raise threads.fault(instruction, *error.args) from error

    return step


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
        return _access(kernel, name, rest[0].split("::")[0], rest[-1], *operands)
    if name in warp.STEPS:
        return warp.STEPS[name](kernel, instruction)
    if name == "mov" or rest[:2] == ["to", "global"]:
        return _move(kernel, rest[-1], *operands)
    compute, kinds = operation(instruction.opcode, len(operands) - 1)
    inputs = [reader(kernel, x, kind) for x, kind in zip(operands[1:], kinds, strict=True)]
    write = writer(kernel, operands[0])
    return lambda threads, lanes: write(threads, lanes, compute(*[read(threads, lanes) for read in inputs]))


def _move(kernel, kind, into, source):
    """mov, of whole registers or between one and its parts; cvta.to.global."""
    bits = 8 * DTYPES[kind].itemsize
    made, given = (f"b{bits // len(listed(x))}" if "{" in x else kind for x in (into, source))
    write, read = writer(kernel, into), reader(kernel, source, given)
    return lambda threads, lanes: write(threads, lanes, read(threads, lanes).view(DTYPES[made]))


def _access(kernel, name, space, kind, into, source):
    """ld and st."""
    if space not in ("param", "global", "shared", "local"):
        raise KeyError(space)
    if name == "st":
        where, read = address(kernel, into), reader(kernel, source, kind)

        def step(threads, lanes):
            threads.spaces[space].write(where(threads, lanes), threads.lane[lanes], read(threads, lanes))
    else:
        where, write, count = address(kernel, source), writer(kernel, into), len(listed(into))

        def step(threads, lanes):
            at, memory = where(threads, lanes), threads.spaces[space]
            write(threads, lanes, memory.read(at, threads.lane[lanes], DTYPES[kind], count))

    return step
