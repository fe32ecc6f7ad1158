"""What a GPU would have to do for a call, counted without one: launches, bytes and products, from dispatched operators.

The call runs on fake tensors of the CPU, which have shapes and no memory, under `as_on_gpu`: ops take their Triton
backends, whose launchers run too and whose kernels don't. So the numbers follow the code, and each operator is one of
PyTorch's on a GPU, but for libraries that split theirs into several launches.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.areas._profile import OTHER, PHASES
from bench.limits import MORE_PRODUCTS
from copgen_fast.errors import UsageError
from copgen_fast.ops import backend as backends
from copgen_fast.ops import checks
from copgen_fast.ops.augment import operator as augment
from copgen_fast.ops.library import IMPLEMENTATIONS

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_FREE |= {"_unsafe_view", "is_same_size", "_record_function_enter_new", "_record_function_exit"}
_OVERWRITING = {"copy_", "fill_", "zero_"}
# Tensors of a list that one launch takes: those of an optimiser with three states (MultiTensorApply.cuh in PyTorch).
_OF_A_LIST = 36
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Work:
    """One operator or kernel: what it moves and multiplies.

    Attributes:
        part: the phase of the step that it belongs to, its gradient's work too.
        moved: bytes read and written, each tensor once.
        flops: of products; a multiply-add counts as two. `half`: their factors have half precision.
        pixels: that an augmentation's kernel makes, those beside the images in its last tiles too; 0 of others.
    """

    part: str
    backward: bool
    name: str
    launches: int
    moved: int
    flops: int
    half: bool
    pixels: int = 0


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, ops take a GPU's backends for tensors on the CPU, and look at no values.

    Raises:
        UsageError: Triton is missing, whose launches are to be counted.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise UsageError("counting launches needs Triton: pip install triton") from error
    table = {op: {**of, "cpu": of["cuda"]} for op, of in backends._FASTEST.items()}
    for op in (op for op, of in table.items() if "triton" in of["cuda"]):
        backends.load("triton", op)  # kernels imported within would be Triton's interpreter's ever after
    with (
        mock.patch.dict(backends._FASTEST, table),
        mock.patch.object(checks, "readable", lambda value: False),
        mock.patch.object(augment, "expect_valid", lambda *_: None),
        mock.patch.object(knobs.runtime, "interpret", True),  # tile sizes without a driver: those of sm_80 on
    ):
        yield


class Counter(TorchDispatchMode):
    """`with Counter() as counted: ...; counted.works`: every operator that computes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self._marks = [OTHER]
        # Autograd numbers its nodes as forward operations make them: the number from which on a phase made them.
        self._numbers: list[int] = []
        self._phases: list[str] = []
        self._patches = contextlib.ExitStack()
        self._entered = 0  # an op's launcher is counted within

    def __enter__(self) -> Counter:
        self._entered += 1
        if self._entered == 1:
            enter, leave = record_function.__enter__, record_function.__exit__

            def entered(mark: record_function) -> record_function:
                self._mark(self._marks + [mark.name if mark.name in PHASES else self._marks[-1]])
                return enter(mark)

            def left(mark: record_function, *error: Any) -> None:
                self._mark(self._marks[:-1])
                return leave(mark, *error)

            self._patches.enter_context(mock.patch.object(record_function, "__enter__", entered))
            self._patches.enter_context(mock.patch.object(record_function, "__exit__", left))
            self._mark(self._marks)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered -= 1
        if not self._entered:
            self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "copgen_fast":
            self._add_kernels(func, args, kwargs)
        elif not _is_free(func, args, result):
            self._add(func, args, kwargs, result)
        return result

    def _mark(self, marks: list[str]) -> None:
        self._marks = marks
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._phases.append(marks[-1])

    def _where(self) -> tuple[str, bool]:
        """The phase, and whether this is the gradient's work."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._marks[-1], False
        number = node._sequence_nr()
        place = bisect.bisect_right(self._numbers, number) - 1
        known = 0 <= place and number < 2**62  # where a gradient is accumulated, there is no number
        return self._phases[place] if known else OTHER, True

    def _add(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        flops = products(func, args, kwargs, result)
        moved = bytes_of([*_read(func, args, kwargs), *tree_leaves(result)])
        self.works.append(Work(*self._where(), _name(func), _launches(func, args), moved, flops, _is_half(args)))

    def _add_kernels(self, func: Any, args: tuple, kwargs: dict) -> None:
        """The launches of an op of this package; its products are its last kernel's."""
        first = len(self.works)

        def launch(kernel: Any, grid: Any) -> Callable[..., None]:
            def recorded(*given: Any, **constants: Any) -> None:
                moved = bytes_of(tree_leaves(given))
                tile = [constants.get(name, 0) for name in ("ROWS", "STRIPS", "COLUMNS")]
                pixels = math.prod((*grid, *tile)) if all(tile) else 0
                self.works.append(Work(*self._where(), kernel.__name__, 1, moved, 0, False, pixels))

            return recorded

        from copgen_fast.kernels.launch import Launch
        from triton.runtime.jit import KernelInterface

        with (
            mock.patch.object(Launch, "__call__", Launch.anew),  # also where a real call has compiled before
            mock.patch.object(KernelInterface, "__getitem__", launch),
            self,
        ):
            IMPLEMENTATIONS[func._schema.name](*args, **kwargs)
        flops = products_of_op(_name(func), args)
        if flops and len(self.works) > first:
            last = self.works[-1]
            half = any(x in _HALF for x in args if isinstance(x, torch.dtype))
            self.works[-1] = Work(last.part, last.backward, last.name, 1, last.moved, flops, half)


def products(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Floating-point operations of a matrix product or convolution; 0 of anything else."""
    count = (flop_registry | MORE_PRODUCTS).get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


def products_of_op(name: str, args: tuple) -> int:
    """Those of the fused InfoNCE, which PyTorch doesn't know: the gradient computes similarities again."""
    if name not in ("row_losses", "row_gradients"):
        return 0
    rows, columns = args[:2]
    pairs = len(rows) * len(rows if columns is None else columns)
    return 2 * pairs * rows.shape[1] * (1 if name == "row_losses" else 2)


def bytes_of(values: Sequence[Any]) -> int:
    """Bytes of the tensors among these, each once; of an expanded one, what it holds."""
    tensors = {id(x): x for x in values if isinstance(x, Tensor)}.values()
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)


def _read(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """What an operator reads: all its arguments, except those that it overwrites."""
    named = zip(func._schema.arguments, args, strict=False)
    given = [*((x, value) for x, value in named), *((None, value) for value in kwargs.values())]
    overwritten = func.__name__.partition(".")[0] in _OVERWRITING
    return tree_leaves([value for x, value in given if not (overwritten and x is not None and x.alias_info)])


def _is_free(func: Any, args: tuple, result: Any) -> bool:
    """Whether an operator launches nothing: allocations, views, and what returns no tensor."""
    results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if func.is_view or _name(func) in _FREE or func.namespace in ("prim", "profiler"):
        return True
    if func._schema.is_mutable:
        return False
    given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(x.untyped_storage()._cdata in given for x in results)


def _launches(func: Any, args: tuple) -> int:
    if _name(func) == "convolution_backward":
        return sum(args[-1])
    lists = [len(x) for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    listed = _name(func).startswith(("_foreach", "_fused", "_amp_foreach"))
    return math.ceil(lists[0] / _OF_A_LIST) if listed and lists else 1


def _is_half(args: tuple) -> bool:
    first = next((x for x in tree_leaves(args) if isinstance(x, Tensor)), None)
    return first is not None and first.dtype in _HALF


def _name(func: Any) -> str:
    return func._overloadpacket.__name__
