"""PyTorch operators whose calls cost little on the host: torch.library.custom_op without what it wraps each call in.

Its wrappers take half of the host's time of a forward and backward: they look for aliases, switch TorchDynamo off, and
read the schema in every call. `torch.library.opcheck` looks for the same mistakes in tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("copgen_fast", "FRAGMENT")
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operator runs on real tensors, by its qualified name."""


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorator that makes a function with type hints the operator `copgen_fast::NAME` for every device.

    Its results must be new tensors. One that mutates an argument has to count up that one's version itself.
    """

    def define(implementation: Callable[..., Any]) -> OpOverload:
        schema = torch.library.infer_schema(implementation, mutates_args=mutates)
        _LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        IMPLEMENTATIONS[f"copgen_fast::{name}"] = implementation
        return getattr(torch.ops.copgen_fast, name).default

    return define


def register_autograd(op: OpOverload, vjp: Callable[..., tuple], setup_context: Callable[..., None]) -> None:
    """Give `op`, which takes tensors but no lists of them, a backward: as torch.library.register_autograd does."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *inputs, keyset = given
            output = below(keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            return *vjp(ctx, *grads), None

    def below(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def call(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiable.apply(*inputs, keyset)
        return below(keyset, *inputs)

    Differentiable.__name__ = f"{op._opname}_autograd"
    _LIBRARY.impl(op._opname, call, "Autograd", with_keyset=True)
