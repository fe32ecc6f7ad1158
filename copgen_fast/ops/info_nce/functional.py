"""The InfoNCE loss: a function and a module."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor, readable
from copgen_fast.ops.derivatives import backend_for, transformed
from copgen_fast.ops.info_nce import reference
from copgen_fast.ops.info_nce.group import Gather, all_gather, expect_equal_batches
from copgen_fast.ops.info_nce.operator import Similarity
from copgen_fast.ops.info_nce.rows import Form, info_nce_rows

MAX_DIMENSION = 2048
TEMPERATURES = (1e-30, 1e30)
"""Smallest and largest temperature: beyond them logits or their sums are no float32."""
_REDUCTIONS = ("mean", "sum", "none")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class InfoNCEStats(NamedTuple):
    """Statistics of a batch, without gradient and without the factor of `base_temperature`.

    Attributes:
        losses: loss of each row in nats, [2N] with anchors first when symmetric, [N] otherwise.
        contrastive_top1: share of the rows whose nearest column is one of their positives, [], 0 to 1.
        mi_lower_bound: log K - mean loss in nats, [], of K candidates a row, positive and negatives: with one
            positive a row a lower bound of the views' mutual information (van den Oord et al. 2018, Eq. 9).
    """

    losses: Tensor
    contrastive_top1: Tensor
    mi_lower_bound: Tensor


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    symmetric: bool = True,
    labels: Tensor | None = None,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    check_finite: bool = False,
    equal_batches: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of N anchors and their positives, row i of one with row i of the other.

    With unit rows a_i, p_i (the inputs after L2 normalisation, lengths floored at 1e-12) and temperature t:

    - symmetric (NT-Xent, the reference code's): over the 2N rows v = [a; p],
      -log( exp(v_i.v_j / t) / sum_{k != i} exp(v_i.v_k / t) ), j the other view of i;
      2N - 2 negatives a row. One pair alone has no negatives: its loss is 0, up to rounding.
      Of K positives each, over the (1 + K) N rows, the mean of that term over the K other views of i, outside the log;
    - one-sided (paper, Eq. 1): -log( exp(a_i.p_i / t) / sum_k exp(a_i.p_k / t) ); the N - 1 other positives
      are the negatives.

    The fused and chunked backends keep no similarity matrix (C++ that of up to 512 pairs): memory is linear in N.
    Second and forward-mode derivatives and torch.func's transforms are the reference's, with the whole matrix; a group
    has none of them.

    Args:
        anchors, positives: floating [N, D], N >= 1, 1 <= D <= 2048; K positives of each anchor are
            [K, N, D]. Losses and sums are float32 for half precisions; on a GPU products have factors of that half
            precision.
        temperature: t from 1e-30 to 1e30; a tensor of shape [] gets a gradient. (On a GPU that one is not checked:
            t <= 0 gives NaN.)
        base_temperature: b multiplies the loss by t / b; None by 1. The reference code fixes b = 0.07, so with
            t = 0.1 its loss is 1/0.7 of the textbook's.
        symmetric: NT-Xent, or the one-sided form.
        labels: integers [N] of the pairs, supervised contrastive (Khosla et al. 2020, Eq. 2, the mean outside the
            log): all rows of i's label but i itself are its positives (one-sided: all p_k of its label). A label
            below 0 is unknown: only the other view is positive.
        negatives: floating [Q, D], a queue of more negatives for every row; no gradient.
        in_batch: False leaves the batch's other rows out of the sum: a row has its positive and `negatives` alone, as
            in MoCo (He et al. 2020, Eq. 1). Not with labels.
        negative_ids: integers [Q, E], which pairs of the batch (numbered over all ranks) each of the negatives was
            made of: it is no negative of their rows. Without statistics; products are chunked on every backend.
        normalize: False takes the rows as they are.
        group: negatives (and positives of one label) from all ranks of a torch.distributed group, each with equally
            many rows; gradients are those of the sum of all ranks' losses, which DistributedDataParallel's mean
            makes those of the whole batch's. `negatives` are each rank's own.
        reduction: "mean", "sum" or "none" over this rank's rows.
        return_stats: also return `InfoNCEStats`.
        check_finite: raise for NaN and infinity, which waits for the device; else they spread to the loss.
        equal_batches: the ranks of the group are known to have equally many rows. By default this is checked, for
            which the host waits for the device; unchecked, unequal ranks hang or compute nonsense.
        backend: a name from `backends()`; None takes the fastest. "reference" multiplies matrices under PyTorch's
            settings, so on a GPU TF32 applies where it was switched on.

    Returns:
        The loss, float32 (float64 for float64 inputs), of shape [], or for "none" [(1 + K) N] with anchors first when
        symmetric, [N] otherwise. With `return_stats`, (loss, stats).

    A row no longer than 1e-12 stays almost zero and takes no gradient.

    Raises:
        TypeError: an input of the wrong kind.
        ValueError: shapes that differ or are not [N, D], N = 0, D over the limit, inputs on two devices, labels of
            another length, a temperature out of range, ranks with unequal batches, NaN with `check_finite`, an unknown
            reduction, an unavailable backend.
    """
    _expect_embeddings(anchors, positives, negatives, check_finite)
    positives = positives[0] if positives.ndim == 3 and len(positives) == 1 else positives
    views = 2 if positives.ndim == 2 else 1 + len(positives)
    if views > 2 and not (symmetric and in_batch):
        raise ValueError("positives: several of each anchor go with symmetric=True and in_batch=True, give [N, D]")
    _expect_temperature(temperature, base_temperature)
    labels = _expect_labels(labels, anchors)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if negatives is not None and len(negatives) == 0:
        negatives = None
    _expect_queue(negatives, in_batch, negative_ids, labels, return_stats)
    if group is not None and not equal_batches:
        expect_equal_batches("anchors", anchors, group)
    form = Form(temperature, symmetric, labels, negatives, in_batch, negative_ids, normalize, group, views)
    name = resolve("info_nce", anchors.device, backend, dtype=anchors.dtype, dimension=anchors.shape[1])
    given = (anchors, positives, temperature if isinstance(temperature, Tensor) else None)
    if group is not None and transformed(*given):
        raise ValueError("group: torch.func's transforms and forward-mode derivatives stay within one process")
    name = backend_for(name, backend, *given)
    if name in ("triton", "cuda") and torch.float64 in (anchors.dtype, positives.dtype):
        raise ValueError(f"backend: {name} has no float64; chunked and reference do")
    if name == "reference":
        losses, correct = _by_definition(anchors, positives, form)
    else:
        similarity = _similarity(anchors, positives, form, return_stats, name)
        losses, correct = info_nce_rows(anchors, positives, form, similarity)
    loss = losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    return (loss, _stats(losses.detach(), correct, form)) if return_stats else loss


class InfoNCELoss(nn.Module):
    """`info_nce` as a module: `loss = InfoNCELoss(temperature=0.1)(anchors, positives)`.

    `learn_temperature` makes the logarithm of the temperature a parameter.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        symmetric: bool = True,
        *,
        learn_temperature: bool = False,
        in_batch: bool = True,
        normalize: bool = True,
        group: dist.ProcessGroup | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _expect_temperature(temperature, base_temperature)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        self._temperature = temperature
        self.base_temperature = base_temperature
        self.symmetric = symmetric
        self.in_batch = in_batch
        self.normalize = normalize
        self.group = group
        self.reduction = reduction
        self.backend = backend

    @property
    def temperature(self) -> float | Tensor:
        """Temperature; a tensor of shape [] where it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self, anchors: Tensor, positives: Tensor, labels: Tensor | None = None, negatives: Tensor | None = None
    ) -> Tensor:
        """Loss of anchors and positives, floating [N, D]; see `info_nce`."""
        return info_nce(
            anchors,
            positives,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            symmetric=self.symmetric,
            labels=labels,
            negatives=negatives,
            in_batch=self.in_batch,
            normalize=self.normalize,
            group=self.group,
            reduction=self.reduction,
            backend=self.backend,
        )

    def __getstate__(self) -> dict[str, object]:
        if self.group is not None:
            raise TypeError("InfoNCELoss: a process group can be neither saved nor copied; set group = None before")
        return self.__dict__

    def extra_repr(self) -> str:
        temperature = self._temperature if self.log_temperature is None else "learned"
        return f"temperature={temperature}, base_temperature={self.base_temperature}, symmetric={self.symmetric}"


def _similarity(anchors: Tensor, positives: Tensor, form: Form, with_nearest: bool, backend: str) -> Similarity:
    learned = isinstance(form.temperature, Tensor)
    temperature = 1.0 if learned else float(form.temperature)
    # Products are bounded only of normalised rows, and where the host knows the temperature.
    bound = 1 / temperature if form.normalize and not learned else math.inf
    precision = torch.promote_types(anchors.dtype, positives.dtype)
    if backend in ("cpp", "chunked"):
        precision = torch.promote_types(precision, torch.float32)
    elif backend == "cuda":
        precision = torch.float16
    return Similarity(temperature, bound, with_nearest, precision, backend)


def _by_definition(anchors: Tensor, positives: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The reference: this rank's rows of the whole batch of a group."""
    group, labels, n = form.group, form.labels, len(anchors)
    if group is not None:
        each = positives.unbind() if positives.ndim == 3 else [positives]
        anchors, *each = (Gather.apply(x, group) for x in (anchors, *each))
        positives = torch.stack(each) if len(each) > 1 else each[0]
        labels = None if labels is None else all_gather(labels, group)
    rest = (form.temperature, form.symmetric, labels, form.negatives, form.in_batch, form.negative_ids, form.normalize)
    results = reference.info_nce_rows(anchors, positives, *rest)
    if group is None:
        return results
    start = dist.get_rank(group) * n
    starts = [view * len(anchors) + start for view in range(form.views if form.symmetric else 1)]
    losses, correct = (torch.cat([x[at : at + n] for at in starts]) for x in results)
    return losses, correct


def _stats(losses: Tensor, correct: Tensor, form: Form) -> InfoNCEStats:
    ranks = 1 if form.group is None else dist.get_world_size(form.group)
    candidates = len(losses) * ranks - int(form.symmetric) if form.in_batch else 1
    candidates += 0 if form.negatives is None else len(form.negatives)
    # A tensor's logarithm, as a number's would fix the batch size of a compiled graph.
    bound = losses.new_full((), candidates).log() - losses.mean()
    return InfoNCEStats(losses, correct.to(losses.dtype).mean(), bound)


def _expect_embeddings(anchors: Tensor, positives: Tensor, negatives: Tensor | None, check_finite: bool) -> None:
    expect_tensor("anchors", anchors, ("N", "D"))
    several = ("K",) if isinstance(positives, Tensor) and positives.ndim == 3 else ()
    expect_tensor("positives", positives, (*several, "N", "D"))
    if anchors.shape != positives.shape[len(several) :]:
        raise ValueError(
            f"anchors and positives: expected one shape, got {list(anchors.shape)} and {list(positives.shape)}"
        )
    if 0 in positives.shape[:-1]:
        raise ValueError("anchors and positives: expected at least one row, got none")
    if not 1 <= anchors.shape[1] <= MAX_DIMENSION:
        raise ValueError(f"anchors: expected D from 1 to {MAX_DIMENSION}, got {anchors.shape[1]}")
    if negatives is not None:
        expect_tensor("negatives", negatives, ("Q", anchors.shape[1]))
    for name, x in (("anchors", anchors), ("positives", positives), ("negatives", negatives)):
        if x is None:
            continue
        if x.device != anchors.device:
            raise ValueError(f"{name}: on {x.device}, but anchors are on {anchors.device}")
        if check_finite and not x.isfinite().all():
            raise ValueError(f"{name}: holds NaN or infinity")


def _expect_queue(
    negatives: Tensor | None, in_batch: bool, ids: Tensor | None, labels: Tensor | None, return_stats: bool
) -> None:
    if negatives is None and not (in_batch and ids is None):
        raise ValueError(f"{'negative_ids' if in_batch else 'in_batch=False'}: needs a queue, give negatives")
    if labels is not None and not in_batch:
        raise ValueError("in_batch=False: leaves out the positives of a label, give no labels")
    if ids is not None:
        expect_tensor("negative_ids", ids, (len(negatives), "E"), _INTEGERS)
        if return_stats:
            raise ValueError("negative_ids: rows have different numbers of negatives, for which there are no stats")


def _expect_labels(labels: Tensor | None, anchors: Tensor) -> Tensor | None:
    if labels is None:
        return None
    expect_tensor("labels", labels, (len(anchors),), _INTEGERS)
    if labels.device != anchors.device:
        raise ValueError(f"labels: on {labels.device}, but anchors are on {anchors.device}")
    return labels.long()


def _expect_temperature(temperature: float | Tensor, base_temperature: float | None) -> None:
    if not isinstance(temperature, Tensor):
        _expect_in_range("temperature", temperature)
    else:
        expect_tensor("temperature", temperature, ())
        if readable(temperature):
            _expect_in_range("temperature", temperature.item())
    if base_temperature is not None:
        _expect_in_range("base_temperature", base_temperature)


def _expect_in_range(argument: str, value: float) -> None:
    low, high = TEMPERATURES
    if not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{argument}: expected a number from {low:g} to {high:g}, got {value!r}")
