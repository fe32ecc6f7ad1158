"""NT-Xent of the embeddings of a joint batch of views, anchors first."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_tensor


def nt_xent(
    embeddings: Tensor,
    temperature: float,
    base_temperature: float | None,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    positives: int = 1,
) -> Tensor:
    """Symmetric NT-Xent of embeddings [(1 + K) N, D] whose rows i, N + i ... are views of one instance; a scalar.

    With labels, int64 [N], it is the supervised contrastive loss: all rows of a class are positives of each other.

    Args:
        group: negatives, and positives of a class, from all its ranks, which must have equally many rows each: see
            `ops.info_nce`.
        positives: of each anchor, K: all views of an instance are positives of each other.

    Raises:
        TypeError, ValueError: no floating-point matrix, a number of rows that 1 + K does not divide, or one pair alone,
            without negatives.
    """
    expect_tensor("embeddings", embeddings, ("(1 + K) N", "D"))
    views = 1 + positives
    if len(embeddings) % views:
        many = "as many positives" if positives == 1 else f"{positives} times as many positives"
        raise ValueError(f"embeddings: expected anchors and {many}, got {len(embeddings)} rows")
    if len(embeddings) * (1 if group is None else dist.get_world_size(group)) == views:
        raise ValueError("embeddings: one pair alone has no negatives, expected two or more")
    dtype = product_dtype(embeddings.dtype, embeddings.device, embeddings.shape[1])
    anchors, *others = embeddings.to(dtype).chunk(views)
    others = others[0] if positives == 1 else torch.stack(others)
    factor = {"temperature": temperature, "base_temperature": base_temperature}
    return info_nce(anchors, others, **factor, labels=labels, group=group, equal_batches=True)


def one_sided(
    embeddings: Tensor,
    queries: Tensor,
    temperature: float,
    base_temperature: float | None,
    labels: Tensor | None,
    group: dist.ProcessGroup | None,
    positives: int,
) -> Tensor:
    """One-sided InfoNCE of queries [N, D] and the positives in embeddings, as `nt_xent` takes them; a scalar.

    Of several positives, the mean of the loss with the first of each row, with the second, and so on.
    """
    dtype = product_dtype(embeddings.dtype, embeddings.device, embeddings.shape[1])
    options = {"temperature": temperature, "base_temperature": base_temperature, "symmetric": False}
    options |= {"labels": labels, "group": group, "equal_batches": True}
    _, *others = embeddings.to(dtype).chunk(1 + positives)
    return torch.stack([info_nce(queries.to(dtype), rows, **options) for rows in others]).mean()


def product_dtype(dtype: torch.dtype, device: torch.device, dimension: int) -> torch.dtype:
    """The dtype in which embeddings are multiplied: at least float32, except float16 on Turing, whose kernel takes only
    that (and adds in float32).
    """
    half = dtype == torch.float16 and device.type == "cuda"
    if half and resolve("info_nce", device, dtype=dtype, dimension=dimension) == "cuda":
        return dtype
    return torch.promote_types(dtype, torch.float32)
