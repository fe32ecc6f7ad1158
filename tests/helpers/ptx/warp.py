"""PTX instructions in which the threads of a warp act together, and copies that go on beside the threads.

Each maker takes a kernel and an instruction, and returns a function of (threads, lanes).
"""

import numpy as np

from tests.helpers.ptx.arithmetic import from_bfloat
from tests.helpers.ptx.operands import address, listed, reader, writer

LANE = np.arange(32)


def _gathered(pairs):
    """[warps, matrices, 8, 8] of [lanes, numbers]: of each matrix a thread has two neighbours in a row."""
    count = pairs.shape[1] // 2
    return pairs.reshape(-1, 8, 4, count, 2).transpose(0, 3, 1, 2, 4).reshape(-1, count, 8, 8)


def _scattered(matrices):
    """The other way round."""
    count = matrices.shape[1]
    return matrices.reshape(-1, count, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 2 * count)


def _present(threads, instruction, lanes):
    """Refuse to go on without all threads of each one's warp."""
    lanes = threads.lane[lanes]
    alone = np.bincount(lanes // 32)[lanes // 32] < 32
    if alone.any():
        raise threads.fault(instruction, lanes[alone][0], "acts with threads of its warp that are elsewhere")


def _shuffle(kernel, instruction):
    """shfl: what another thread of the warp, or of a part of it, has."""
    into, _, valid = instruction.operands[0].partition("|")
    choose = {
        "bfly": lambda by, first, part: LANE ^ by,
        "idx": lambda by, first, part: first | (by & ~part),
    }[instruction.opcode[2]]
    reads = [reader(kernel, x, "b32") for x in instruction.operands[1:]]
    write, tell = writer(kernel, into), writer(kernel, valid or "_")

    def step(threads, lanes):
        _present(threads, instruction, lanes)
        values, by, limit, members = (read(threads, lanes).reshape(-1, 32) for read in reads)
        if (members != 0xFFFFFFFF).any():
            raise threads.fault(instruction, threads.lane[lanes][0], "acts with some threads of its warp only")
        part = limit >> 8 & 31
        first = LANE & part
        chosen = choose(by, first, part)
        inside = chosen <= (first | limit & 31 & ~part)
        write(threads, lanes, np.take_along_axis(values, np.where(inside, chosen, LANE), 1).reshape(-1, 1))
        tell(threads, lanes, inside.reshape(-1, 1))

    return step


def _matrices(kernel, instruction):
    """ldmatrix and stmatrix: 8 x 8 numbers of 16 bits, whose rows' addresses the threads give in turn."""
    loads = instruction.opcode[0] == "ldmatrix"
    names, where = instruction.operands if loads else reversed(instruction.operands)
    use = writer(kernel, names) if loads else reader(kernel, names, "b32")
    at, count = address(kernel, where), len(listed(names))
    turned = (0, 1, 3, 2) if "trans" in instruction.opcode else (0, 1, 2, 3)

    def step(threads, lanes):
        _present(threads, instruction, lanes)
        shared, rows = threads.spaces["shared"], (threads.lane[lanes], at(threads, lanes))
        acting, rows = (x.reshape(-1, 32)[:, : 8 * count].reshape(-1) for x in rows)
        if loads:
            matrices = shared.read(rows, acting, np.dtype("u2"), 8).reshape(-1, count, 8, 8)
            use(threads, lanes, _scattered(matrices.transpose(turned)).view(np.uint32))
        else:
            matrices = _gathered(use(threads, lanes).view(np.uint16)).transpose(turned)
            shared.write(rows, acting, matrices.reshape(-1, 8))

    return step


def _multiply(kernel, instruction):
    """mma.m16n8k8 and k16 of half precision: products and their sum in float64, rounded once to float32."""
    _, _, _, shape, _, _, into, kind, _, sum_kind = instruction.opcode
    if shape not in ("m16n8k8", "m16n8k16") or {into, sum_kind} != {"f32"} or kind not in ("f16", "bf16"):
        raise KeyError(shape)
    write = writer(kernel, instruction.operands[0])
    left, right, added = instruction.operands[1:]
    factors, sums = [reader(kernel, x, "b32") for x in (left, right)], reader(kernel, added, "f32")

    def step(threads, lanes):
        _present(threads, instruction, lanes)
        halves = (read(threads, lanes).view(np.uint16) for read in factors)
        numbers = (from_bfloat(x) if kind == "bf16" else x.view(np.float16).astype(np.float64) for x in halves)
        a, b, c = map(_gathered, (*numbers, sums(threads, lanes)))
        a = a.reshape(len(a), -1, 2, 8, 8).transpose(0, 2, 3, 1, 4).reshape(len(a), 16, -1)
        b = b.transpose(0, 1, 3, 2).reshape(len(b), -1, 8)
        made = a.astype(np.float64) @ b + c.reshape(-1, 16, 8)
        write(threads, lanes, _scattered(made.astype(np.float32).reshape(-1, 2, 8, 8)))

    return step


class Copies:
    """Asynchronous copies to shared memory: what they bring is there once waited for, not before."""

    def __init__(self, count):
        self.groups = np.zeros(count, int)  # that a thread has ended
        self.pending = []

    def wait(self, threads, lanes, most):
        """Finish all groups of these threads but their last `most`."""
        pending, self.pending = self.pending, []
        for copy in pending:
            of, group, at, values = copy
            ready = np.isin(of, threads.lane[lanes]) & (group < self.groups[of] - most)
            threads.spaces["shared"].write(at[ready], of[ready], values[ready])
            if not ready.all():
                self.pending.append([x[~ready] for x in copy])


def _copy(kernel, instruction):
    """cp.async, its groups and the wait for them."""
    what, operands = instruction.opcode[2], instruction.operands
    if what == "commit_group":
        return lambda threads, lanes: np.add.at(threads.copies.groups, lanes, 1)
    if what == "wait_group":
        return lambda threads, lanes: threads.copies.wait(threads, lanes, int(operands[0]))
    if instruction.opcode[1] != "async" or what not in ("ca", "cg"):
        raise KeyError(what)
    to, of, count = address(kernel, operands[0]), address(kernel, operands[1]), int(operands[2], 0)
    filled = reader(kernel, operands[-1], "b32")  # as many as are copied, where nothing else is given

    def step(threads, lanes):
        acting, into, copied = threads.lane[lanes], to(threads, lanes), filled(threads, lanes)[:, 0]
        values = np.full((len(acting), count), 0xFF, np.uint8)
        threads.spaces["shared"].write(into, acting, values, pending=True)
        here = copied > 0
        values[here] = threads.spaces["global"].read(of(threads, lanes)[here], acting[here], np.dtype("u1"), count)
        values[np.arange(count) >= copied[:, None]] = 0
        threads.copies.pending.append((acting, threads.copies.groups[acting], into, values))

    return step


STEPS = {"shfl": _shuffle, "ldmatrix": _matrices, "stmatrix": _matrices, "mma": _multiply, "cp": _copy}
"""Makers of steps, by the first part of an opcode."""
