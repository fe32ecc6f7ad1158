"""Launches that cost the host little: Triton's look at every argument, 20 to 40 us, is spared from the second on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
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


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Context in which Triton launches on the tensor's device, which need not be the current one."""
    if not tensor.is_cuda or tensor.device.index == driver.active.get_current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


class Launch:
    """A kernel's launch on one grid, with compile-time constants and options, as a function of its other arguments.

    Calls must agree in all that Triton compiles for: the dtypes of tensors, which arguments are None, and the values of
    numbers. With `specialized` its code depends on where tensors are, too, and numbers that the kernel doesn't
    specialise may differ.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], specialized: bool = False, **constants: Any) -> None:
        self.kernel, self.constants, self.specialized = kernel, constants, specialized
        self.grid = (*grid, 1, 1)[:3]
        self.compiled = {}  # what the first call on each device compiled, with the constants as the last arguments

    def __call__(self, *arguments: Any) -> None:
        ready = self.compiled and not (self.specialized and _is_rare(arguments))
        compiled = self.compiled.get(driver.active.get_current_device()) if ready else None
        if compiled is not None:
            launch, values = compiled
            launch(*arguments, *values)
            return
        made = self.anew(*arguments)
        # Otherwise it is an interpreter's, or only compiled.
        launched = getattr(made, "module", None) is not None
        if launched and not (self.specialized and _is_rare(arguments)):
            values = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
            self.compiled[driver.active.get_current_device()] = made[self.grid], values

    def anew(self, *arguments: Any) -> Any:
        """Launch as if for the first time, through Triton's own look at the arguments."""
        return self.kernel[self.grid](*arguments, **self.constants)


def _is_rare(arguments: tuple[Any, ...]) -> bool:
    """Whether Triton compiles anew for these: for addresses that are no multiples of 16, and for large numbers."""
    return any(x.data_ptr() % 16 if isinstance(x, Tensor) else x is not None and x >= 2**31 for x in arguments)
