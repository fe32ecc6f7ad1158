"""What every loader of pairs hands out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NO_LABEL = -1


class PairBatch(NamedTuple):
    """A batch of pairs; rows i belong together.

    Attributes:
        anchors, positives: uint8 [B, 3, H, W], channels_last from the loaders here.
        labels: int64 [B], the class of each pair (real or pseudo); NO_LABEL where there is none.
    """

    anchors: Tensor
    positives: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """uint8 [2B, 3, H, W], anchors first; a view where both lie in one tensor, as from the loaders here."""
        first, second = self.anchors, self.positives
        apart = second.data_ptr() - first.data_ptr()  # in bytes, as uint8
        same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        if same and first.stride() == second.stride() and apart == len(first) * first.stride(0):
            return first.as_strided((2 * len(first), *first.shape[1:]), first.stride())
        return torch.cat((first, second))


class Batches(Protocol):
    """Shuffled batches by global step: the batch of a step depends on the data, the order's settings and the step.

    Attributes:
        steps_per_epoch: batches in an epoch.
        skipped: pairs found corrupt so far and replaced, sorted.
    """

    steps_per_epoch: int

    @property
    def skipped(self) -> list[int]: ...

    def __call__(self, step: int) -> PairBatch:
        """The batch of a global step; 0 is the first of epoch 0."""
        ...
