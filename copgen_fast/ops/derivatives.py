"""Derivatives that fused operators have no rule for are taken of the operators' definitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def transformed(*inputs: Tensor | None) -> bool:
    """Whether a transform of torch.func is under way, or an input has a tangent of forward-mode differentiation.

    An operator without a rule for tangents would drop them, and the derivative would be zero.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def backend_for(chosen: str, given: str | None, *inputs: Tensor | None) -> str:
    """`chosen`, or "reference" where the fused operators have no rule for what is asked of them.

    Raises:
        ValueError: the caller's `given` is a fused backend there.
    """
    if chosen == "reference" or not transformed(*inputs):
        return chosen
    if given is None:
        return "reference"
    raise ValueError(
        f"backend: {given} has no forward-mode derivative and no rule for torch.func's transforms; "
        "leave backend out, or take 'reference'"
    )


Tensors = tuple[Tensor, ...]


def differentiated_again(gradient: Tensor) -> bool:
    """Whether a backward's own result is differentiated: with create_graph=True, by a tangent or by a transform."""
    return torch.is_grad_enabled() or transformed(gradient)


def pull(definition: Callable[..., Tensor], inputs: Tensors, gradient: Tensor) -> Tensors:
    """Gradients with respect to the inputs from that of `definition(*inputs)`, themselves differentiable."""
    return torch.func.vjp(definition, *inputs)[1](gradient)


def expect_no_graph(what: str) -> None:
    """Refuse, within a backward, to be differentiated again: what it computes would count as a constant.

    torch.autograd.function.once_differentiable does so only where the gradient that comes in requires a gradient.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{what} has no second derivatives: leave out create_graph=True")
