"""Every op on this device against float64: its error beside that of PyTorch's own operators in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copgen_fast import augmentations
from copgen_fast.ops import AugmentParams, augment, cond_norm, info_nce
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.info_nce.l2_normalize import l2_normalize, l2_normalize_reference
from copgen_fast.runtime import seeds

# A fused op may be this many times as wrong as PyTorch's operators.
ALLOWED = 2.0
_DIMENSION = 128


@dataclass(frozen=True)
class Check:
    """Relative errors, ||got - exact|| / ||exact||, of an op's values or of its gradients.

    Attributes:
        error, pytorch: ours and PyTorch's. `ratio` is ours over PyTorch's, each at least a tenth of the dtype's step.
    """

    op: str
    backend: str
    dtype: str
    of: str
    error: float
    pytorch: float
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= ALLOWED


@dataclass(frozen=True)
class Subject:
    """An op: its differentiable inputs in float64, and how it is computed from them by a backend."""

    inputs: list[Tensor]
    run: Callable[[Sequence[Tensor], str], Tensor]


def checks(device: torch.device) -> Iterator[Check]:
    """Two for every op and dtype: float32, and on a GPU float16 too."""
    for dtype in (torch.float32, *((torch.float16,) if device.type == "cuda" else ())):
        for op, subject in subjects(device).items():
            backend = resolve(op, device, dtype=dtype, dimension=_DIMENSION)
            yield from compare(op, subject, backend, dtype)


def compare(op: str, subject: Subject, backend: str, dtype: torch.dtype) -> Iterator[Check]:
    """Of the op's values and of its gradients; both computations see inputs that are rounded to `dtype`."""
    rounded = [x.to(dtype) for x in subject.inputs]
    exact = _values_and_gradients(subject, [x.double() for x in rounded], "reference")
    ours, theirs = (_values_and_gradients(subject, rounded, name) for name in (backend, "reference"))
    least = torch.finfo(dtype).eps / 10
    for of, truth, mine, peer in zip(("values", "gradients"), exact, ours, theirs, strict=True):
        error, pytorch = ((x - truth).norm().item() / truth.norm().item() for x in (mine, peer))
        ratio = max(error, least) / max(pytorch, least)
        yield Check(op, backend, str(dtype).removeprefix("torch."), of, error, pytorch, ratio)


def _values_and_gradients(subject: Subject, inputs: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """Each as one float64 vector; the gradients are those of a fixed weighted sum of the values."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    values = subject.run(leaves, backend)
    weights = torch.linspace(-1, 1, values.numel(), dtype=torch.float64, device=values.device).view(values.shape)
    gradients = torch.autograd.grad(values, leaves, weights.to(values.dtype))
    return values.detach().double().flatten(), torch.cat([x.double().flatten() for x in gradients])


def subjects(device: torch.device) -> dict[str, Subject]:
    """Every op of `copgen_fast.ops`, at a size that takes milliseconds."""
    random = seeds.generator("doctor")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def on_device(*tensors: Tensor) -> list[Tensor]:
        return [x.to(device) for x in tensors]

    pictures = torch.rand(8, 3, 64, 64, generator=random, dtype=torch.float64)
    params = AugmentParams.sample(8, (64, 64), augmentations.get("simclr"), generator=random).to(device)
    return {
        "augment": Subject(
            on_device(pictures),
            lambda x, backend: augment(x[0], params, 64, out_dtype=x[0].dtype, backend=backend),
        ),
        "info_nce": Subject(
            on_device(*drawn(2, 112, _DIMENSION)),
            lambda x, backend: info_nce(x[0], x[1], temperature=0.1, backend=backend),
        ),
        "l2_normalize": Subject(on_device(*drawn(2, 112, _DIMENSION)), _l2_normalize),
        "cond_norm": Subject(
            on_device(drawn(4, 96, 32, 32).to(memory_format=torch.channels_last), *drawn(2, 4, 96)),
            lambda x, backend: cond_norm(*x, backend=backend),
        ),
    }


def _l2_normalize(x: Sequence[Tensor], backend: str) -> Tensor:
    if x[0].dtype == torch.float64:
        return l2_normalize_reference(torch.cat(list(x)))
    return l2_normalize(*x, backend)[0]
