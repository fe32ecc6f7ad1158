"""Where and in which precision a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from copgen_fast.errors import UsageError

if TYPE_CHECKING:
    from typing import Self  # not in Python 3.10

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Movable(Protocol):
    """A tensor, or a set of them: AugmentParams."""

    @property
    def device(self) -> torch.device: ...

    def pin_memory(self) -> Self: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> Self: ...


_Values = TypeVar("_Values", bound=Movable)


def send(values: _Values, device: torch.device) -> _Values:
    """`values` on `device`; from the host to a GPU by way of page-locked memory, without waiting for the GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def resolve(device: str, precision: str) -> torch.device:
    """The device named by `--device`; `auto` is the first GPU where there is one.

    Raises:
        UsageError: there is no such device here, or it can't compute in that precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device} is not usable here ({reason}): choose cpu, cuda or auto") from error
    if precision == "fp16" and resolved.type == "cpu":
        raise UsageError("--precision fp16 needs a CUDA device: choose fp32 or bf16 on the CPU")
    if precision == "bf16" and resolved.type == "cuda" and torch.cuda.get_device_capability(resolved) < (8, 0):
        raise UsageError(
            f"--precision bf16 needs a GPU of sm_80 or newer, {torch.cuda.get_device_name(resolved)} has none: "
            "choose fp16 or auto"
        )
    return resolved


def make_current(device: torch.device) -> None:
    """Let a GPU be the one that streams, graphs and kernels without an argument for it mean.

    `cuda` without a number is the current one already, and torch refuses to set it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, fp16 or bf16; `auto` is what the device's matrix units take: bf16, on Volta and Turing fp16."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Context in which an encoder's matrix work runs in `precision`."""
    precision = resolve_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def grad_scaler(device: torch.device, precision: str, *dtypes: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling where anything on the gradient's way is fp16; else it passes everything through unchanged.

    Args:
        dtypes: what is computed in besides the run's precision: a generator's float16, say.
    """
    enabled = resolve_precision(precision, device) == "fp16" or torch.float16 in dtypes
    return torch.amp.GradScaler(device.type, enabled=enabled)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolve in float32 where float32 is asked for: unasked, a GPU of sm_80 or newer rounds the factors to TF32, by
    5e-4, which `--precision fp32` and `--generator.level exact` do not promise. (Matrix products are not, unasked.)
    """
    cudnn = torch.backends.cudnn
    # PyTorch 2.9 has a setting for each kind, and refuses to read them as one where they differ.
    each = hasattr(cudnn, "conv")
    kinds, name, full = ((cudnn.conv, cudnn.rnn), "fp32_precision", "ieee") if each else ((cudnn,), "allow_tf32", False)
    before = [(kind, getattr(kind, name)) for kind in kinds]
    try:
        for kind, _ in before:
            setattr(kind, name, full)
        yield
    finally:
        for kind, value in before:
            setattr(kind, name, value)
