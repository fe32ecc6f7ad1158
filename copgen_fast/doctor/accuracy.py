"""Accuracy of every op on this device: its error against float64 beside that of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copgen_fast import augmentations
from copgen_fast.ops import (
    AugmentParams,
    RandAugmentParams,
    RandAugmentPolicy,
    add_upsampled,
    augment,
    cond_norm,
    conv3x3,
    info_nce,
    rand_augment,
)
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.info_nce.l2_normalize import l2_normalize, l2_normalize_reference
from copgen_fast.ops.rand_augment.params import AFFINE, OPERATIONS
from copgen_fast.runtime import seeds

ALLOWED = 2.0
"""Largest ratio of a fused op's error to that of PyTorch's operators, but for those below."""
_OF_FEWER_PRODUCTS = 6.0  # F(4 x 4, 3 x 3) adds and takes off what a direct convolution never forms
_DIMENSION = 128
_SIDE = 32
_STEP = 1e-5  # several times the distance from a kink within which float32 takes a value to be at it


@dataclass(frozen=True)
class Check:
    """Relative errors, ||got - exact|| / ||exact||, of an op's values or of its gradients.

    Attributes:
        error, pytorch: ours and PyTorch's.
        ratio: ours over PyTorch's, each taken as at least a tenth of the dtype's eps.
        allowed: the largest ratio that is right.
    """

    op: str
    backend: str
    dtype: str
    of: str
    error: float
    pytorch: float
    ratio: float
    allowed: float = ALLOWED

    @property
    def passed(self) -> bool:
        return self.ratio <= self.allowed


@dataclass(frozen=True)
class OpCase:
    """An op's differentiable inputs in float64, and a function of them and of a backend's name that computes it."""

    inputs: list[Tensor]
    run: Callable[[Sequence[Tensor], str], Tensor]
    allowed: float = ALLOWED


def checks(device: torch.device) -> Iterator[Check]:
    """Checks of values and of gradients for every op and dtype: float32, and on a GPU float16."""
    for dtype in (torch.float32, *((torch.float16,) if device.type == "cuda" else ())):
        for op, case in op_cases(device).items():
            backend = resolve(op, device, dtype=dtype, dimension=_DIMENSION)
            yield from compare(op, case, backend, dtype)


def compare(op: str, case: OpCase, backend: str, dtype: torch.dtype) -> Iterator[Check]:
    """Check the op's values and gradients; all computations take inputs that are rounded to `dtype`."""
    rounded = [x.to(dtype) for x in case.inputs]
    exact = _values_and_gradients(case, [x.double() for x in rounded], "reference")
    ours, theirs = (_values_and_gradients(case, rounded, name) for name in (backend, "reference"))
    least = torch.finfo(dtype).eps / 10
    for of, truth, mine, peer in zip(("values", "gradients"), exact, ours, theirs, strict=True):
        error, pytorch = ((x - truth).norm().item() / truth.norm().item() for x in (mine, peer))
        ratio = max(error, least) / max(pytorch, least)
        yield Check(op, backend, str(dtype).removeprefix("torch."), of, error, pytorch, ratio, case.allowed)


def _values_and_gradients(case: OpCase, inputs: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """Values, and gradients of a fixed weighted sum of them, as one float64 vector each."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    values = case.run(leaves, backend)
    weights = torch.linspace(-1, 1, values.numel(), dtype=torch.float64, device=values.device).view(values.shape)
    gradients = torch.autograd.grad(values, leaves, weights.to(values.dtype))
    return values.detach().double().flatten(), torch.cat([x.double().flatten() for x in gradients])


def op_cases(device: torch.device) -> dict[str, OpCase]:
    """A case of every op of `copgen_fast.ops`, of a size that takes milliseconds."""
    random = seeds.generator("doctor")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def on_device(*tensors: Tensor) -> list[Tensor]:
        return [x.to(device) for x in tensors]

    # Values of float16, so that a dtype's rounding moves none to a kink.
    pictures = torch.rand(24, 3, _SIDE, _SIDE, generator=random).half().double()
    params = AugmentParams.sample(24, (_SIDE, _SIDE), augmentations.get("simclr"), generator=random)
    smooth = away_from_kinks(pictures, lambda x: _augmented(x, params, "reference"))
    augmented, params = pictures[smooth], params.map(lambda x: x[smooth].to(device))
    # Not those that interpolate: in other precision they may fall on the next level. Nor is the magnitude 10: at a
    # factor of 1.9, which has other digits in other precision, whole levels fall on 0 and 255.
    policy = RandAugmentPolicy(
        probability=1.0, magnitude=7.0, operations=tuple(name for name in OPERATIONS if name not in AFFINE)
    )
    uniform = torch.rand(24, 5 * policy.steps, generator=random, dtype=torch.float64)
    operations = RandAugmentParams.from_uniform(uniform, policy).map(lambda x: x.to(device))
    levels = torch.randint(256, pictures.shape, generator=random).double() / 255
    return {
        "augment": OpCase(on_device(augmented), lambda x, backend: _augmented(x[0], params, backend)),
        "rand_augment": OpCase(on_device(levels), lambda x, backend: rand_augment(x[0], operations, backend=backend)),
        "info_nce": OpCase(
            on_device(*drawn(2, 112, _DIMENSION)),
            lambda x, backend: info_nce(x[0], x[1], temperature=0.1, backend=backend),
        ),
        "l2_normalize": OpCase(on_device(*drawn(2, 112, _DIMENSION)), _l2_normalize),
        "cond_norm": OpCase(
            on_device(drawn(4, 96, 32, 32).to(memory_format=torch.channels_last), *drawn(2, 4, 96)),
            lambda x, backend: cond_norm(*x, backend=backend),
        ),
        "conv3x3": OpCase(
            on_device(drawn(16, 64, 12, 12).to(memory_format=torch.channels_last), drawn(48, 64, 3, 3)),
            lambda x, backend: conv3x3(*x, backend=backend),
            _OF_FEWER_PRODUCTS,
        ),
        "add_upsampled": OpCase(
            on_device(*(drawn(4, 96, n, n).to(memory_format=torch.channels_last) for n in (32, 16)), drawn(96)),
            lambda x, backend: add_upsampled(*x, backend=backend),
        ),
    }


def away_from_kinks(pictures: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Which pictures, float64 [N, 3, h, w], have a gradient that is continuous around them: bool [N].

    At a clamp's bound, or where two channels cross, the gradient jumps, and in another precision a value may be on the
    other side: one such value would hide the errors of all others. A jump between x - d and x + d shows
    in g(x + d) - 2 g(x) + g(x - d), for steps d that move all channels, or one against the others.
    """

    def gradients(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        values = run(leaf)
        weights = torch.linspace(-1, 1, values[0].numel(), dtype=x.dtype).view(values[0].shape)
        return torch.autograd.grad(values, leaf, weights.expand_as(values))[0].flatten(1)

    here, smooth = gradients(pictures), torch.ones(len(pictures), dtype=torch.bool)
    for signs in ((1, 1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1)):
        step = _STEP * torch.tensor(signs, dtype=pictures.dtype)[:, None, None]
        second = gradients(pictures + step) - 2 * here + gradients(pictures - step)
        smooth &= second.norm(dim=1) <= 1e-9 * here.norm(dim=1)
    return smooth


def _augmented(images: Tensor, params: AugmentParams, backend: str) -> Tensor:
    return augment(images, params, _SIDE, out_dtype=images.dtype, backend=backend)


def _l2_normalize(x: Sequence[Tensor], backend: str) -> Tensor:
    if x[0].dtype == torch.float64:
        return l2_normalize_reference(torch.cat(list(x)))
    return l2_normalize(*x, backend)[0]
