"""Devices and precisions: parsing, autocast, loss scaling, transfers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from copgen_fast.errors import UsageError

if TYPE_CHECKING:
    from typing import Self  # not in Python 3.10

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Tensors(Protocol):
    """A dataclass of tensors, all on one device, like AugmentParams."""

    @property
    def device(self) -> torch.device: ...

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `change` applied to every tensor."""


_Values = TypeVar("_Values", bound=Tensor | Tensors)


def send(values: _Values, device: torch.device) -> _Values:
    """Copy to `device`; from the host to a GPU through pinned memory, without waiting for the GPU."""
    through_pinned = device.type == "cuda" and values.device.type == "cpu"
    if isinstance(values, Tensor):
        return values.pin_memory().to(device, non_blocking=True) if through_pinned else values.to(device)
    return together(values, device, pinned=True) if through_pinned else values.map(lambda x: x.to(device))


def together(values: Tensors, device: torch.device, pinned: bool = False) -> Tensors:
    """Copy all tensors of a dataclass to `device` by one transfer, as each takes the host some 30 us."""
    tensors: list[Tensor] = []
    values.map(lambda x: tensors.append(x) or x)
    # Aligned, as Triton and vectorised copies like it.
    sizes = [size for x in tensors for size in (x.nbytes, -x.nbytes % 64)]

    def parts(buffer: Tensor) -> list[Tensor]:
        return [y.view(x.dtype).view(x.shape) for x, y in zip(tensors, buffer.split(sizes)[::2], strict=True)]

    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    torch._foreach_copy_(parts(host), tensors)
    there = iter(parts(host.to(device, non_blocking=pinned)))
    return values.map(lambda _: next(there))


def resolve(device: str, precision: str) -> torch.device:
    """The torch.device of `--device`; `auto` is the current GPU, or the CPU without one.

    Raises:
        UsageError: there is no such device, or it does not support that precision.
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
    """torch.cuda.set_device for a GPU with a number; `cuda` without one is the current GPU already."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, fp16 or bf16; `auto` is what the device's tensor cores take: bf16 from sm_80 on, fp16 from sm_70 on."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 instructions; elsewhere PyTorch emulates them."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """torch.autocast to `precision`; nothing for fp32."""
    precision = resolve_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def grad_scaler(device: torch.device, precision: str, *dtypes: torch.dtype) -> torch.amp.GradScaler:
    """A GradScaler, enabled where the run's precision is fp16 or any of `dtypes` (a generator's, say) is float16."""
    enabled = resolve_precision(precision, device) == "fp16" or torch.float16 in dtypes
    return torch.amp.GradScaler(device.type, enabled=enabled)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in cuDNN's convolutions, which PyTorch enables on GPUs from sm_80 on (it rounds factors by 5e-4).

    PyTorch leaves TF32 off for matrix products.
    """
    kinds, name, full = _cudnn_settings()
    before = [(kind, getattr(kind, name)) for kind in kinds]
    try:
        for kind, _ in before:
            setattr(kind, name, full)
        yield
    finally:
        for kind, value in before:
            setattr(kind, name, value)


def _cudnn_settings() -> tuple[tuple[object, ...], str, object]:
    """What to set to leave TF32 off: objects, the name of their attribute, and its value.

    PyTorch has one flag, `allow_tf32`, and from 2.9 on a precision for each kind of operation. The flag can't be read
    any more once precisions differ from it, so those are taken only where somebody has set them.
    """
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        common = {cudnn.fp32_precision, torch.backends.fp32_precision}
        if common != {"none"} or cudnn.conv.fp32_precision != cudnn.rnn.fp32_precision:
            return (cudnn.conv, cudnn.rnn), "fp32_precision", "ieee"
    return (cudnn,), "allow_tf32", False
