"""Projectors and predictors with batch norm, and forwards of one view at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn


def mlp(*dims: int, last: Literal["affine", "norm", "norm without weights"] = "affine") -> nn.Sequential:
    """Affine layers from dims[0] to dims[-1], batch norm and a ReLU after all but the last.

    Args:
        last: batch norm after the last layer too, or none. A layer before batch norm has no bias.
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip(dims, dims[1:], strict=False), start=2):
        if number < len(dims):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last == "affine":
            layers += [nn.Linear(before, after)]
        else:
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after, affine=last == "norm")]
    return nn.Sequential(*layers)


def per_view(net: Callable[[Tensor], tuple[Tensor, ...]], v: Tensor, joint: bool) -> tuple[Tensor, ...]:
    """`net` of the views [2N, 3, H, W]: of each view for itself, with its own batch statistics, or of all at once."""
    if joint:
        return net(v)
    return tuple(torch.cat(views) for views in zip(*map(net, v.chunk(2)), strict=True))


def predictor_apart(trunk: Iterable[nn.Module], predictor: nn.Module, fixed: bool) -> list[dict[str, Any]]:
    """Groups of parameters for the optimiser: those of the trunk, and the predictor's, whose rate may be fixed."""
    parameters = [parameter for module in trunk for parameter in module.parameters()]
    return [{"params": parameters}, {"params": list(predictor.parameters()), "scheduled": not fixed}]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine of rows of x and y [N, D], at least in float32."""
    return nn.functional.cosine_similarity(full(x), full(y)).mean()


def full(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
