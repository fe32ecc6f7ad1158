"""Gradient accumulation for a loss that compares all of a batch with all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from copgen_fast.encoders import statistics_held


def backward(
    f: nn.Module,
    embed: Callable[[Tensor], Tensor],
    views: Tensor,
    objective: Callable[[Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    parts: int = 1,
    held: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of objective(embed(views)), scaled, to f's parameters; keep one part's activations at a time.

    GradCache (Gao et al. 2021, arXiv:2101.06983): all embeddings without a graph; the gradient of the objective with
    respect to them; then each part's embeddings again, with a graph, and their gradient through f. It is the whole
    batch's gradient, negatives of other parts included, for one more forward of f. Batch normalisation takes its
    statistics within a part; the running ones see each part once.

    Args:
        f: what is trained.
        embed: f as it is called, views [M, 3, H, W] to embeddings [M, D].
        views: joint batch [2N, 3, H, W], anchors first; a part has both views of its pairs.
        objective: embeddings [2N, D], anchors first, to a scalar.
        scaler: scales it before gradients are taken.
        parts: divides N.
        held: context of the backward of every part but the last, for gradients that several processes share.

    Returns:
        Embeddings [2N, D] and the objective's value [], without gradients.

    Raises:
        ValueError: parts that do not divide N.
    """
    if len(views) % (2 * parts):
        raise ValueError(f"parts: expected a divisor of {len(views) // 2} pairs, got {parts}")
    if parts == 1:
        with record_function("estimator"):
            embeddings = embed(views)
        with record_function("loss"):
            value = objective(embeddings)
        with record_function("backward"):
            scaler.scale(value).backward()
        return embeddings.detach(), value.detach()
    split = _split(views, parts)
    with record_function("estimator"), torch.no_grad(), statistics_held(f):
        embeddings = _joined([embed(part) for part in split])
    embeddings.requires_grad_()
    with record_function("loss"):
        value = objective(embeddings)
        (gradient,) = torch.autograd.grad(scaler.scale(value), embeddings)
    for number, (part, wanted) in enumerate(zip(split, _split(gradient, parts), strict=True), start=1):
        with contextlib.nullcontext() if number == parts else held():
            with record_function("estimator"):
                again = embed(part)
            with record_function("backward"):
                again.backward(wanted)
    return embeddings.detach(), value.detach()


def _split(joint: Tensor, parts: int) -> list[Tensor]:
    """[2N, ...] to parts of 2N / parts rows, anchors first in each."""
    return [part.flatten(0, 1) for part in joint.unflatten(0, (2, -1)).chunk(parts, dim=1)]


def _joined(parts: list[Tensor]) -> Tensor:
    """The inverse of `_split`."""
    return torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)
