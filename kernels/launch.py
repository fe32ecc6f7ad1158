"""Launches that cost the host little: Triton's look at every argument, 20 to 40 us, is spared from the second on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

PLANS = 256
"""Sizes for which a launcher remembers what it found."""
_HERE = nullcontext()


class Layout(NamedTuple):
    """What a launch depends on of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    contiguous: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        return cls(tensor.dtype, tensor.shape, tensor.stride(), tensor.is_contiguous())


def offsets(*extents: int) -> tl.dtype:
    """Integer dtype of offsets into up to so many values: int64, which is slower, only where int32 doesn't suffice.

    One bit is left for what the last block counts beyond the end.
    """
    return tl.int64 if max(extents) > 2**30 else tl.int32


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Context in which Triton launches on the tensor's device, which need not be the current one."""
    if not tensor.is_cuda or tensor.device.index == driver.active.get_current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def current_device() -> int | None:
    """The device that launches go to now; None in Triton's interpreter."""
    return None if knobs.runtime.interpret else driver.active.get_current_device()


class _Compiled(NamedTuple):
    """What a first call compiled: its launch, the constants as the last arguments, and where arguments may be rare."""

    launch: Callable[..., None]
    constants: list[Any]
    tensors: list[int]
    integers: list[int]

    def fits(self, arguments: tuple[Any, ...]) -> bool:
        """Whether Triton would take this one: addresses are multiples of 16, integers have 32 bits."""
        for at in self.tensors:
            if arguments[at].data_ptr() % 16:
                return False
        for at in self.integers:
            if arguments[at] >= 2**31:
                return False
        return True


class Launch:
    """A kernel's launch on one grid, with compile-time constants and options, as a function of its other arguments.

    Calls must agree in all that Triton compiles for: the dtypes of tensors, which arguments are None, and the values of
    numbers. With `specialized` its code depends on where tensors are, too, and numbers that the kernel doesn't
    specialise may differ.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], specialized: bool = False, **constants: Any) -> None:
        self.kernel, self.constants, self.specialized = kernel, constants, specialized
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: dict[int, _Compiled] = {}  # by device

    def __call__(self, *arguments: Any) -> None:
        known = self.compiled.get(driver.active.get_current_device()) if self.compiled else None
        if known is not None and known.fits(arguments):
            known.launch(*arguments, *known.constants)
            return
        made = self.anew(*arguments)
        # Otherwise it is an interpreter's, or only compiled.
        if known is None and getattr(made, "module", None) is not None:
            constants = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
            looked_at = list(enumerate(arguments)) if self.specialized else []
            places = ([at for at, x in looked_at if isinstance(x, kind)] for kind in (Tensor, int))
            compiled = _Compiled(made[self.grid], constants, *places)
            if compiled.fits(arguments):
                self.compiled[driver.active.get_current_device()] = compiled

    def anew(self, *arguments: Any) -> Any:
        """Launch as if for the first time, through Triton's own look at the arguments."""
        return self.kernel[self.grid](*arguments, **self.constants)
