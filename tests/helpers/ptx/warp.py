"""PTX instructions in which the threads of a warp act together, and copies that go on beside the threads.

Each maker takes an instruction and the makers `reader`, `writer` and `address` of run.py, for a kernel's operands.
"""

import numpy as np

from tests.helpers.ptx.arithmetic import from_bfloat
from tests.helpers.ptx.parse import listed

LANE = np.arange(32)
ROW, PAIR = LANE[:, None] // 4, LANE[:, None] % 4 * 2 + [0, 1]
"""What a thread has of a matrix of 8 x 8: two neighbouring numbers of a row."""


def _present(threads, instruction, lanes, needed):
    """Refuse to go on without `needed` [lanes, 32] threads of each one's warp."""
    here = np.zeros(threads.count, bool)
    here[lanes] = True
    alone = (needed & ~here.reshape(-1, 32)[lanes // 32]).any(1)
    if alone.any():
        raise threads.fault(instruction, lanes[alone][0], "acts with threads of its warp that are elsewhere")


def _shuffle(instruction, reader, writer, address):
    mode = instruction.opcode[2]
    into, _, valid = instruction.operands[0].partition("|")
    value, other, clamp, members = (reader(x, "b32") for x in instruction.operands[1:])
    store, tell = writer(into, "b32"), writer(valid or "_", "pred")

    def step(threads, lanes):
        of = threads.lane[lanes]
        lane, by, limit = of % 32, other(threads, lanes).astype(int), clamp(threads, lanes).astype(int)
        segment = limit >> 8 & 31
        first = lane & segment
        last = first | (limit & 31 & ~segment)
        chosen = {"bfly": lane ^ by, "idx": first | (by & ~segment), "up": lane - by, "down": lane + by}[mode]
        inside = chosen >= last if mode == "up" else chosen <= last
        chosen = np.where(inside, chosen, lane)
        named = np.broadcast_to(members(threads, lanes), len(of)).astype(int)[:, None] >> LANE & 1 == 1
        _present(threads, instruction, of, named | (chosen[:, None] == LANE))
        everyone = np.zeros(threads.count, np.uint32)
        everyone[lanes] = value(threads, lanes)
        store(threads, lanes, everyone[of - lane + chosen])
        tell(threads, lanes, inside)

    return step


def _matrices(instruction, reader, writer, address):
    """ldmatrix and stmatrix: 8 x 8 numbers of 16 bits, whose rows' addresses the threads give in turn."""
    loads, operands = instruction.opcode[0] == "ldmatrix", instruction.operands
    names = listed(operands[0 if loads else 1])
    uses = [(writer if loads else reader)(x, "b32") for x in names]
    at, count = address(operands[1 if loads else 0]), 8 * len(uses)
    place = (slice(None), PAIR, ROW) if "trans" in instruction.opcode else (slice(None), ROW, PAIR)

    def step(threads, lanes):
        of, shared = threads.lane[lanes], threads.spaces["shared"]
        _present(threads, instruction, of, LANE >= 0)
        acting, rows = (x.reshape(-1, 32)[:, :count].reshape(-1) for x in (of, at(threads, lanes)))
        matrices = np.empty((len(of) // 32, len(uses), 8, 8), np.uint16)
        if loads:
            with threads.catching(instruction, acting):
                matrices[:] = shared.read(rows, acting, np.dtype("u2"), 8).reshape(matrices.shape)
        for i, use in enumerate(uses):
            if loads:
                use(threads, lanes, np.ascontiguousarray(matrices[:, i][place]).view(np.uint32).reshape(-1))
            else:
                pairs = np.ascontiguousarray(use(threads, lanes)).view(np.uint16)
                matrices[:, i][place] = pairs.reshape(-1, 32, 2)
        if not loads:
            with threads.catching(instruction, acting):
                shared.write(rows, acting, matrices.reshape(-1, 8))

    return step


def _multiply(instruction, reader, writer, address):
    """mma.m16n8k8 and k16 of half precision: products and their sum in float64, rounded once to float32."""
    _, _, _, shape, *_, into, kind, other_kind, sum_kind = instruction.opcode
    if shape not in ("m16n8k8", "m16n8k16") or kind != other_kind or {into, sum_kind} != {"f32"}:
        raise KeyError(shape)
    depth = int(shape.partition("k")[2])
    result, left, right, sums = map(listed, instruction.operands)
    stores, added = [writer(x, "f32") for x in result], [reader(x, "f32") for x in sums]
    lefts, rights = ([reader(x, "b32") for x in names] for names in (left, right))

    def step(threads, lanes):
        of = threads.lane[lanes]
        _present(threads, instruction, of, LANE >= 0)
        a, b, c = (np.empty((len(of) // 32, *size)) for size in ((16, depth), (depth, 8), (16, 8)))

        def halves(value):
            bits = np.ascontiguousarray(value(threads, lanes)).view(np.uint16)
            return (from_bfloat(bits) if kind == "bf16" else bits.view(np.float16)).reshape(-1, 32, 2)

        for i, value in enumerate(lefts):
            a[:, ROW + i % 2 * 8, PAIR + i // 2 * 8] = halves(value)
        for i, value in enumerate(rights):
            b[:, PAIR + i * 8, ROW] = halves(value)
        for i, value in enumerate(added):
            c[:, ROW[:, 0] + i // 2 * 8, PAIR[:, i % 2]] = np.broadcast_to(value(threads, lanes), len(of)).reshape(
                -1, 32
            )
        made = (a @ b + c).astype(np.float32)
        for i, store in enumerate(stores):
            store(threads, lanes, made[:, ROW[:, 0] + i // 2 * 8, PAIR[:, i % 2]].reshape(-1))

    return step


class Copies:
    """Asynchronous copies to shared memory: what they bring is there once waited for, not before."""

    def __init__(self, count):
        self.groups = np.zeros(count, int)  # that a thread has ended
        self._pending = []

    def add(self, lanes, at, values):
        self._pending.append((lanes, self.groups[lanes], at, values))

    def wait(self, threads, lanes, most):
        """Finish all groups of these threads but their last `most`."""
        waits = np.zeros(threads.count, bool)
        waits[lanes] = True
        pending, self._pending = self._pending, []
        for copy in pending:
            of, group, at, values = copy
            ready = waits[of] & (group < self.groups[of] - most)
            threads.spaces["shared"].write(at[ready], of[ready], values[ready])
            if not ready.all():
                self._pending.append([x[~ready] for x in copy])


def _copy(instruction, reader, writer, address):
    """cp.async, its groups and the wait for them."""
    what = instruction.opcode[2]
    if what == "commit_group":

        def commit(threads, lanes):
            threads.copies.groups[lanes] += 1

        return commit
    if what == "wait_group":
        most = int(instruction.operands[0])
        return lambda threads, lanes: threads.copies.wait(threads, threads.lane[lanes], most)
    if instruction.opcode[1] != "async" or what not in ("ca", "cg"):
        raise KeyError(what)
    into, source, size, *given = instruction.operands
    to, of, count = address(into), address(source), int(size, 0)
    filled = reader(given[0] if given else size, "b32")

    def step(threads, lanes):
        acting = threads.lane[lanes]
        here = np.broadcast_to(filled(threads, lanes), len(acting)) > 0  # zeros elsewhere
        values = np.zeros((len(acting), count), np.uint8)
        with threads.catching(instruction, acting[here]):
            values[here] = threads.spaces["global"].read(of(threads, lanes)[here], acting[here], np.dtype("u1"), count)
        threads.copies.add(acting, to(threads, lanes), values)

    return step


STEPS = {"shfl": _shuffle, "ldmatrix": _matrices, "stmatrix": _matrices, "mma": _multiply, "cp": _copy}
"""Makers of steps, by the first part of an opcode."""
