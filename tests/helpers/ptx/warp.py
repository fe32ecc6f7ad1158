"""PTX instructions in which the threads of a warp act together, and copies that go on beside the threads.

Each maker takes a kernel and an instruction, and returns a function of (threads, lanes).
"""

import numpy as np

from tests.helpers.ptx.arithmetic import from_bfloat
from tests.helpers.ptx.operands import address, listed, reader, readers, writer, writers

LANE = np.arange(32)
ROW, PAIR = LANE[:, None] // 4, LANE[:, None] % 4 * 2 + [0, 1]
"""What a thread has of a matrix of 8 x 8: two neighbouring numbers of a row."""


def _present(threads, instruction, lanes, needed=True):
    """Refuse to go on without `needed` [lanes, 32] threads of each one's warp; all where nothing is said."""
    here = np.zeros(threads.count, bool)
    here[lanes] = True
    alone = (needed & ~here.reshape(-1, 32)[lanes // 32]).any(1)
    if alone.any():
        raise threads.fault(instruction, lanes[alone][0], "acts with threads of its warp that are elsewhere")


def _shuffle(kernel, instruction):
    """shfl: what another thread of the warp, or of a part of it, has."""
    into, _, valid = instruction.operands[0].partition("|")
    choose = {
        "bfly": lambda lane, by, first, part: lane ^ by,
        "idx": lambda lane, by, first, part: first | (by & ~part),
    }[instruction.opcode[2]]
    value, other, clamp, members = (reader(kernel, x, "b32") for x in instruction.operands[1:])
    store, tell = writer(kernel, into, "b32"), writer(kernel, valid or "_", "pred")

    def step(threads, lanes):
        of = threads.lane[lanes]
        lane, by, limit = of % 32, other(threads, lanes).astype(int), clamp(threads, lanes).astype(int)
        part = limit >> 8 & 31
        first = lane & part
        chosen = choose(lane, by, first, part)
        inside = chosen <= (first | (limit & 31 & ~part))
        chosen = np.where(inside, chosen, lane)
        named = np.broadcast_to(members(threads, lanes), len(of)).astype(int)[:, None] >> LANE & 1 == 1
        _present(threads, instruction, of, named | (chosen[:, None] == LANE))
        everyone = np.zeros(threads.count, np.uint32)
        everyone[lanes] = value(threads, lanes)
        store(threads, lanes, everyone[of - lane + chosen])
        tell(threads, lanes, inside)

    return step


def _matrices(kernel, instruction):
    """ldmatrix and stmatrix: 8 x 8 numbers of 16 bits, whose rows' addresses the threads give in turn."""
    loads = instruction.opcode[0] == "ldmatrix"
    names, where = instruction.operands if loads else reversed(instruction.operands)
    use, at, count = (writers if loads else readers)(kernel, names, "b32"), address(kernel, where), len(listed(names))
    row, column = (PAIR, ROW) if "trans" in instruction.opcode else (ROW, PAIR)

    def step(threads, lanes):
        of, shared = threads.lane[lanes], threads.spaces["shared"]
        _present(threads, instruction, of)
        acting, rows = (x.reshape(-1, 32)[:, : 8 * count].reshape(-1) for x in (of, at(threads, lanes)))
        if loads:
            matrices = shared.read(rows, acting, np.dtype("u2"), 8).reshape(-1, count, 8, 8)
            pairs = np.ascontiguousarray(np.moveaxis(matrices[:, :, row, column], 1, 2))
            use(threads, lanes, pairs.view(np.uint32).reshape(-1, count))
        else:
            pairs = use(threads, lanes).view(np.uint16).reshape(-1, 32, count, 2)
            matrices = np.empty((len(pairs), count, 8, 8), np.uint16)
            matrices[:, :, row, column] = np.moveaxis(pairs, 2, 1)
            shared.write(rows, acting, matrices.reshape(-1, 8))

    return step


def _multiply(kernel, instruction):
    """mma.m16n8k8 and k16 of half precision: products and their sum in float64, rounded once to float32."""
    _, _, _, shape, *_, into, kind, other_kind, sum_kind = instruction.opcode
    if shape not in ("m16n8k8", "m16n8k16") or kind != other_kind or {into, sum_kind} != {"f32"}:
        raise KeyError(shape)
    depth = int(shape.partition("k")[2])
    result, *factors, added = instruction.operands
    store, sums = writers(kernel, result, "f32"), readers(kernel, added, "f32")
    lefts, rights = (readers(kernel, x, "b32") for x in factors)

    def step(threads, lanes):
        _present(threads, instruction, threads.lane[lanes])

        def halves(gather):
            bits = gather(threads, lanes).view(np.uint16)
            numbers = from_bfloat(bits) if kind == "bf16" else bits.view(np.float16)
            return numbers.reshape(-1, 32, numbers.shape[1] // 2, 2)

        left, right, summed = halves(lefts), halves(rights), sums(threads, lanes).reshape(-1, 32, 2, 2)
        a, b, c = (np.empty((len(left), *size)) for size in ((16, depth), (depth, 8), (16, 8)))
        for i in range(depth // 4):
            a[:, ROW + i % 2 * 8, PAIR + i // 2 * 8] = left[:, :, i]
        for i in range(depth // 8):
            b[:, PAIR + i * 8, ROW] = right[:, :, i]
        for i in range(2):
            c[:, ROW + i * 8, PAIR] = summed[:, :, i]
        made = (a @ b + c).astype(np.float32)
        store(threads, lanes, np.stack([made[:, ROW, PAIR], made[:, ROW + 8, PAIR]], 2).reshape(-1, 4))

    return step


class Copies:
    """Asynchronous copies to shared memory: what they bring is there once waited for, not before."""

    def __init__(self, count):
        self.groups = np.zeros(count, int)  # that a thread has ended
        self.pending = []

    def wait(self, threads, lanes, most):
        """Finish all groups of these threads but their last `most`."""
        waits = np.zeros(threads.count, bool)
        waits[lanes] = True
        pending, self.pending = self.pending, []
        for copy in pending:
            of, group, at, values = copy
            ready = waits[of] & (group < self.groups[of] - most)
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
        acting = threads.lane[lanes]
        here = np.broadcast_to(filled(threads, lanes), len(acting)) > 0  # zeros elsewhere
        values = np.zeros((len(acting), count), np.uint8)
        at = of(threads, lanes)[here]
        values[here] = threads.spaces["global"].read(at, acting[here], np.dtype("u1"), count)
        threads.copies.pending.append((acting, threads.copies.groups[acting], to(threads, lanes), values))

    return step


STEPS = {"shfl": _shuffle, "ldmatrix": _matrices, "stmatrix": _matrices, "mma": _multiply, "cp": _copy}
"""Makers of steps, by the first part of an opcode."""
