"""Gradients of a loss over the whole batch, with one part's activations in memory at a time (GradCache)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from copgen_fast.encoders import statistics_held

Outputs = tuple[Tensor, ...]
Context = Callable[[], contextlib.AbstractContextManager]


def backward(
    model: nn.Module,
    views: Tensor,
    loss: Callable[[Outputs], Tensor],
    scaler: torch.amp.GradScaler,
    *,
    parts: int = 1,
    of_pair: int = 2,
    autocast: Context = contextlib.nullcontext,
    no_sync: Context = contextlib.nullcontext,
) -> tuple[Outputs, Tensor]:
    """Add the gradients of the scaled loss(model(views)) to the model's parameters.

    With several parts this is GradCache (Gao et al. 2021, arXiv:2101.06983): all outputs without a graph; the gradient
    of the loss with respect to them; then each part's outputs again, with a graph, and their gradient through the
    model. It is the whole batch's gradient, negatives of other parts included, for one more forward. Batch
    normalisation takes its statistics within a part; the running ones see each part once.

    Args:
        model: views [M, 3, H, W] to a tuple of tensors with M rows each, or N, one for each pair.
        views: joint batch [M, 3, H, W], M = of_pair N, anchors first; a part has all views of its pairs.
        loss: outputs of the joint batch, anchors first, to a scalar.
        parts: divides N.
        of_pair: views of each pair: its anchor's and its positives'.
        autocast: context of the model's forward.
        no_sync: context of the backward of every part but the last, for gradients that several processes average.

    Returns:
        The outputs and the loss [], without gradients.

    Raises:
        ValueError: parts that do not divide N.
    """
    pairs = len(views) // of_pair
    if len(views) % (of_pair * parts):
        raise ValueError(f"parts: expected a divisor of {pairs} pairs, got {parts}")
    if parts == 1:
        with record_function("estimator"), autocast():
            outputs = model(views)
        with record_function("loss"):
            value = loss(outputs)
        with record_function("backward"):
            scaler.scale(value).backward()
        return tuple(output.detach() for output in outputs), value.detach()
    split = _split(views, parts, pairs)
    with record_function("estimator"), torch.no_grad(), statistics_held(model), autocast():
        by_part = [model(part) for part in split]
    outputs = tuple(_join(rows, pairs).requires_grad_() for rows in zip(*by_part, strict=True))
    with record_function("loss"):
        value = loss(outputs)
        # An output that the loss doesn't use has a gradient of zeros.
        gradients = torch.autograd.grad(scaler.scale(value), outputs, allow_unused=True, materialize_grads=True)
    by_part = zip(*(_split(gradient, parts, pairs) for gradient in gradients), strict=True)
    for number, (part, gradient) in enumerate(zip(split, by_part, strict=True), start=1):
        with contextlib.nullcontext() if number == parts else no_sync():
            with record_function("estimator"), autocast():
                again = model(part)
            with record_function("backward"):
                torch.autograd.backward(again, gradient)
    return tuple(output.detach() for output in outputs), value.detach()


def _split(joint: Tensor, parts: int, pairs: int) -> Sequence[Tensor]:
    """[V N, ...] of N pairs, anchors first, to parts of V N / parts rows, anchors first in each."""
    return [part.flatten(0, 1) for part in joint.unflatten(0, (-1, pairs)).chunk(parts, dim=1)]


def _join(parts: tuple[Tensor, ...], pairs: int) -> Tensor:
    """The inverse of `_split`."""
    return torch.cat([part.unflatten(0, (-1, pairs // len(parts))) for part in parts], dim=1).flatten(0, 1)
