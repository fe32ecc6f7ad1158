"""InfoNCE's row losses and gradients: their definition in float64, test inputs, tolerances, and the kernels to test."""

import ctypes
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from copgen_fast.ops.info_nce.operator import allow_for_rounding
from tests.helpers.ptx.memory import BEFORE, NEVER, Global, room, users
from tests.helpers.ptx.parse import parse
from tests.helpers.ptx.run import launch

ROW, COLUMN = "row", "column"
# Of weights; Triton's interpreter cuts bfloat16 where a GPU rounds.
ROUNDING = {torch.float16: 2**-10.5, torch.bfloat16: 2**-6.5, torch.float32: 2**-21}


@dataclass
class Case:
    """Rows [m, d] and columns [k, d] (None: the rows), and what both operators take beside them."""

    rows: torch.Tensor
    columns: torch.Tensor | None = None
    temperature: float = 0.1
    bound: float = math.inf
    offset: int = 0
    shift: int = -1
    exclude_self: bool = False
    grads: dict = field(default_factory=dict)  # of the losses, per row [m] and per column [k]
    lses: dict = field(default_factory=dict)  # times the temperature

    @property
    def all_columns(self):
        return self.rows if self.columns is None else self.columns

    def logits(self, dtype=torch.float64):
        """s [m, k]"""
        return self.rows.to(dtype) @ self.all_columns.to(dtype).T / self.temperature

    def masks(self):
        """Booleans [m, k]: the columns in a row's sum, and a row's target."""
        m, k = len(self.rows), len(self.all_columns)
        i, j = torch.arange(m)[:, None], torch.arange(k)[None]
        included = j != self.offset + i if self.exclude_self else torch.ones(m, k, dtype=torch.bool)
        target = j == self.offset + (i + self.shift) % m if self.shift >= 0 else torch.zeros(m, k, dtype=torch.bool)
        return included, target

    def losses(self, dtype=torch.float64):
        """Losses [m] and log-sum-exps [m], the latter times the temperature."""
        included, target = self.masks()
        s = self.logits(dtype)
        lse = s.masked_fill(~included, -math.inf).logsumexp(1)
        return lse - s.masked_fill(~target, 0).sum(1), lse * self.temperature

    def weights(self, dtype=torch.float64):
        """W [m, k]"""
        included, target = self.masks()
        s = self.logits(dtype).masked_fill(~included, -math.inf)
        total = torch.zeros_like(s)
        for kind, axis in ((ROW, 1), (COLUMN, 0)):
            if kind in self.grads:
                grad, lse = (x[kind].to(dtype).unsqueeze(axis) for x in (self.grads, self.lses))
                total += grad * ((s - lse / self.temperature).exp() - target.to(dtype))
        return total

    def grad_rows(self, dtype=torch.float64):
        """[m, d]"""
        return self.weights(dtype) @ self.all_columns.to(dtype) / self.temperature


def unit(n, d, seed, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)


def with_statistics(case, kinds, scale=1.0, seed=0):
    """The case with gradients of the losses, of both signs, and log-sum-exps as the forward pass gives them."""
    generator = torch.Generator().manual_seed(seed)
    m, k = len(case.rows), len(case.all_columns)
    if case.columns is None:
        kinds = (ROW,)
    for kind, n in ((ROW, m), (COLUMN, k)):
        if kind not in kinds:
            continue
        case.grads[kind] = torch.randn(n, generator=generator) / n * scale
        s = case.logits().masked_fill(~case.masks()[0], -math.inf)
        # Other ranks' rows are in a column's sum too: any number that is not below this one's will do.
        more = torch.rand(n, generator=generator).double() if kind == COLUMN else 0
        lse = s.logsumexp(1 if kind == ROW else 0) + more
        case.lses[kind] = (lse * case.temperature).nan_to_num(neginf=0.0).float()
    if case.columns is None:
        case.grads[COLUMN], case.lses[COLUMN] = case.grads[ROW], case.lses[ROW]
    return case


def square(n, d, temperature=0.1, dtype=torch.float16, *, seed=0, bounded=True, shift=None):
    bound = 1 / temperature if bounded else math.inf
    shift = n // 2 if shift is None else shift
    return Case(unit(n, d, seed, dtype), None, temperature, bound, 0, shift, True)


def rectangular(
    m, k, d, temperature=0.1, dtype=torch.float16, offset=0, shift=0, exclude_self=False, *, seed=0, bounded=True
):
    bound = 1 / temperature if bounded else math.inf
    return Case(unit(m, d, seed, dtype), unit(k, d, seed + 1, dtype), temperature, bound, offset, shift, exclude_self)


def assert_losses(case, losses, lse):
    """As good as float32 allows: log-sum-exp and target both as large as the largest logit.

    A product of norm-wise size `size` is off by its sums' roundings, d of 2^-24 at the very most and about sqrt(d)
    of them in fact.
    """
    expected = case.losses()
    size = (case.rows.double().norm(dim=1).max() * case.all_columns.double().norm(dim=1).max()).item()
    steps = 4 + 0.5 * math.sqrt(case.rows.shape[1])
    tolerance = 2e-6 + steps * 2**-23 * size / case.temperature
    for ours, exact, unit in zip((losses, lse), expected, (1, case.temperature), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=3e-7, atol=tolerance * unit)


def assert_gradients(case, grad):
    """Within the weights' rounding: for fp16 2^-11 of each, or 2^-25 of the range up to 2^14; plus the logits' own."""
    columns = case.all_columns.double().abs()
    largest = max(x.abs().max().item() for x in case.grads.values())
    size = (case.rows.double().norm(dim=1).max() * columns.norm(dim=1).max()).item() / case.temperature
    relative = ROUNDING[case.rows.dtype] + (4 + 0.5 * math.sqrt(case.rows.shape[1])) * 2**-23 * size
    unrounded = sum(
        case.grads[kind].double().unsqueeze(axis).abs()
        * (
            (case.logits() - case.lses[kind].double().unsqueeze(axis) / case.temperature).exp() * case.masks()[0]
            + case.masks()[1].double()
        )
        for kind, axis in ((ROW, 1), (COLUMN, 0))
        if kind in case.grads
    )
    tolerance = (unrounded * relative + 2**-37 * largest) @ columns / case.temperature
    error = (grad.double() - case.grad_rows()).abs()
    worst = (error / tolerance.clamp_min(1e-300)).nan_to_num(nan=math.inf).max().item()
    assert worst <= 1 or not error.any(), f"error is {worst:.2f} of what rounding explains"


def check_huge_products(machine, dtype, symmetric):
    """Logits of 1e12, one of which rules its row's sum: its share is 1, though float32 rounds logits by thousands."""
    rows, columns = (1e4 * torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (34, 40))
    case = Case(rows, None if symmetric else columns, 1e-3, math.inf, 0, 17 if symmetric else 0, symmetric)
    losses, lse, *_ = machine.losses(case)
    assert_losses(case, losses, lse)
    allow_for_rounding(lse, case.temperature)
    s = case.logits().masked_fill(~case.masks()[0], -math.inf)
    shares = s.softmax(1) - case.masks()[1].double()
    case.grads[ROW], case.lses[ROW] = torch.ones(len(rows)), lse
    if symmetric:
        case.grads[COLUMN], case.lses[COLUMN] = case.grads[ROW], lse
    weights = shares + (s.T.softmax(0) - case.masks()[1].double() if symmetric else 0)
    expected = weights @ case.all_columns.double() / case.temperature
    grad = machine.gradients(case).double()
    assert (grad - expected).abs().max() <= ROUNDING[torch.float16] * expected.abs().max()


class Matrix(ctypes.Structure):
    """csrc/info_nce/similarity.cuh's Similarity."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("m", "k", "d")),
        *((name, ctypes.c_float) for name in ("scale", "bound")),
        *((name, ctypes.c_int) for name in ("offset", "shift")),
        ("exclude_self", ctypes.c_bool),
    ]


class Statistics(ctypes.Structure):
    """csrc/info_nce/info_nce_backward.cuh's Statistics."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("row_lse", "row_grad", "column_lse", "column_grad")]


WIDE, THIN, TRIANGLE = range(3)  # csrc/info_nce/info_nce_cuda.h's Plan
# Of both shapes of blocks in csrc/info_nce/similarity.cuh: the name, the rows and the threads.
SHAPES, ROWS, THREADS = ("ILi4ELi1ELi8EEE", "ILi1ELi8ELi2EEE"), (64, 16), (128, 256)


class OnCpu:
    """The kernels on the CPU, by tests/helpers/cuda_on_cpu: no access beyond a tensor's end (or before its start).

    Blocks and warps run in an order of their own: 0 as numbered, 1 backwards, else random.
    """

    def __init__(self, library, plan, order=2, at_start=False):
        self.library, self.plan, self.order, self.at_start = ctypes.CDLL(str(library)), plan, order, at_start
        self.library.fenced.restype = ctypes.c_void_p

    def fenced(self, kept, tensor):
        """A copy amid memory that can't be touched, until the ExitStack `kept` ends."""
        size = ctypes.c_size_t(max(tensor.nbytes, 1))
        address = self.library.fenced(size, self.at_start)
        kept.callback(self.library.unfenced, ctypes.c_void_p(address), size)
        memory = (ctypes.c_char * size.value).from_address(address)
        return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)

    def call(self, function, *arguments):
        """Call a function that launches kernels, with tensors or what ctypes takes."""
        self.library.run_in_order(self.order)
        given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        result = function(*given)
        assert result != 1, "threads wait for others that never come"
        assert result != 2, "a kernel accesses memory beyond a tensor"

    def _run(self, kept, function, case, arguments, outputs):
        missing = -case.rows.shape[1] % 8  # as csrc/info_nce/info_nce_cuda.cpp fills up
        filled = [torch.nn.functional.pad(x, (0, missing)) for x in (case.rows, case.all_columns)]
        rows, columns = (self.fenced(kept, x) for x in filled)
        m, d = rows.shape
        matrix = Matrix(rows.data_ptr(), columns.data_ptr(), m, len(columns), d, 1 / case.temperature)
        matrix.bound, matrix.offset, matrix.shift = case.bound, case.offset, case.shift
        matrix.exclude_self = case.exclude_self
        outputs = [None if x is None else self.fenced(kept, x) for x in outputs]
        self.call(function, self.plan, matrix, *arguments, *outputs)
        return [None if x is None else x.clone() for x in outputs]

    def losses(self, case, band=1, nearest=False):
        """losses [m], lse [m], nearest [m], nearest_logit [m]"""
        m = len(case.rows)
        empty = torch.full((m,), math.nan)
        best = (torch.full((m,), -1), empty) if nearest else (None, None)
        with ExitStack() as kept:
            scratch = self.fenced(kept, torch.full((band + 1, m), math.nan))
            return self._run(kept, self.library.row_losses, case, (band, scratch), (empty, empty, *best))

    def gradients(self, case):
        """[m, d]"""
        statistics = Statistics()
        empty = torch.full(case.rows.shape, math.nan)
        with ExitStack() as kept:
            for kind in case.grads:
                for name, values in (("grad", case.grads[kind]), ("lse", case.lses[kind])):
                    shared = case.columns is None and kind == COLUMN
                    pointer = getattr(statistics, f"row_{name}") if shared else self.fenced(kept, values).data_ptr()
                    setattr(statistics, f"{kind}_{name}", pointer)
            arguments = (statistics, case.rows.shape[1])
            return self._run(kept, self.library.row_gradients, case, arguments, (empty,))[0]

    def choose(self, m, bound, multiprocessors, square, nearest):
        """The plan for m rows and columns."""
        matrix = Matrix(m=m, k=m, d=128, bound=bound)
        return self.library.choose(matrix, multiprocessors, square, nearest)


class OnPtx(OnCpu):
    """The kernels as compiled to PTX, run by tests/helpers/ptx, which refuses what no GPU would tell."""

    def __init__(self, text, plan):
        self.library, self.plan, self._text, self._tensors = self, plan, text, {}

    def fenced(self, kept, tensor):
        """A copy; the interpreter guards its ends."""
        copy = tensor.clone()
        self._tensors[copy.data_ptr()] = copy
        return copy

    def call(self, function, *arguments):
        """Call one of the two functions below."""
        function(*arguments)

    def _placed(self, name, place, fresh=False):
        """A kernel's address of a tensor, or of that at a pointer; a `fresh` one must be written before it is read."""
        tensor = place if isinstance(place, torch.Tensor) else self._tensors.get(place)
        if tensor is None:
            return 0
        last = users(room(tensor.data_ptr(), tensor.nbytes)[1], NEVER if fresh else BEFORE)
        return self._memory.add(name, tensor.data_ptr(), tensor.nbytes, None, last)

    def _launch(self, named, x, y, threads, *arguments):
        name = next(name for name in re.findall(r"\.entry (\w+)", self._text) if re.search(named, name))
        kernel, params = parse(self._text, name), bytearray(256)
        for at, argument in zip(kernel.params, arguments, strict=True):
            raw = bytes(argument) if isinstance(argument, ctypes.Structure | ctypes._SimpleCData) else argument
            raw = raw.to_bytes(8, "little", signed=True) if isinstance(raw, int) else raw
            params[at : at + len(raw)] = raw
        launch(kernel, (x, y, 1), (threads, 1, 1), bytes(params), self._memory)

    def _start(self, matrix):
        self._memory = Global()
        given = Matrix.from_buffer_copy(matrix)
        given.rows, given.columns = (self._placed(name, getattr(matrix, name)) for name in ("rows", "columns"))
        return given

    def row_losses(self, plan, matrix, band, scratch, *outputs):
        """As tests/helpers/cuda_on_cpu/info_nce.cpp's."""
        given, m = self._start(matrix), matrix.m
        names = ("losses", "lse", "nearest", "nearest_logit")
        outputs = [self._placed(name, x, True) for name, x in zip(names, outputs, strict=True)]
        if plan != TRIANGLE:
            named = f"row_losses_kernel.*{SHAPES[plan]}Lb{int(matrix.bound <= 40)}ELb{int(outputs[2] > 0)}E"
            return self._launch(named, -(-m // ROWS[plan]), 1, THREADS[plan], given, *outputs)
        losses, lse, *_ = outputs
        carried = self._placed("scratch", scratch, True)
        blocks, sums = -(-m // 64), carried + 4 * m
        for first in range(0, blocks, band):
            size = min(band, blocks - first)
            self._launch("triangle_kernel", size, 1, 128, given, first, lse, sums, losses)
            numbers = (ctypes.c_float(matrix.bound), ctypes.c_float(matrix.scale), int(matrix.shift >= 0), first, size)
            self._launch("triangle_sums", -(-m // 128), 1, 128, m, *numbers, sums, carried, losses, lse)

    def row_gradients(self, plan, matrix, statistics, grad_d, grad_rows):
        """As tests/helpers/cuda_on_cpu/info_nce.cpp's."""
        given, stats = self._start(matrix), Statistics()
        for name, _ in Statistics._fields_:
            setattr(stats, name, self._placed(name, getattr(statistics, name)))
        grads = self._placed("grad_rows", grad_rows, True)
        named = f"row_gradients_kernel.*{SHAPES[plan]}Lb{int(matrix.bound <= 40)}E"
        grid = -(-matrix.m // ROWS[plan]), -(-matrix.d // 128)
        self._launch(named, *grid, THREADS[plan], given, stats, grads, grad_d)


class OnGpu:
    """The operators of C++, which choose plan and band themselves."""

    device = torch.device("cuda")

    def __init__(self):
        import copgen_fast._cpp
        import copgen_fast._cuda  # noqa: F401

        self.row_losses = torch.ops.copgen_fast_cpp.row_losses
        self.row_gradients = torch.ops.copgen_fast_cpp.row_gradients

    def _call(self, function, case, statistics, outputs, **options):
        columns = None if case.columns is None else case.columns.to(self.device)
        outputs = [None if x is None else x.to(self.device, copy=True) for x in outputs]
        statistics = [None if x is None else x.to(self.device) for x in statistics]
        place = (case.offset, case.shift, case.exclude_self)
        rows = case.rows.to(self.device)
        function(rows, columns, case.temperature, case.bound, *statistics, *place, *outputs, **options)
        return [x if x is None else x.cpu() for x in outputs]

    def losses(self, case, nearest=False, **options):
        """losses [m], lse [m], nearest [m], nearest_logit [m]"""
        empty = torch.full((len(case.rows),), math.nan)
        best = (torch.full((len(case.rows),), -1), empty) if nearest else (None, None)
        return self._call(self.row_losses, case, (), (empty, empty, *best), **options)

    def gradients(self, case, **options):
        """[m, d]"""
        kinds = (ROW,) if case.columns is None else (ROW, COLUMN)
        given = {kind: (case.lses.get(kind), case.grads.get(kind)) for kind in kinds}
        statistics = (*given[ROW], *given.get(COLUMN, (None, None)))
        empty = torch.full(case.rows.shape, math.nan)
        return self._call(self.row_gradients, case, statistics, (empty,), **options)[0]


class OnTriton(OnGpu):
    """The Triton kernels, on a GPU or in the interpreter; `options` are those of their functions."""

    def __init__(self):
        from copgen_fast.kernels import info_nce
        from tests.helpers.triton_device import DEVICE

        self.device = torch.device(DEVICE)
        self.row_losses, self.row_gradients = info_nce.row_losses, info_nce.row_gradients
