"""Self-supervised methods: what pretraining minimises. One file each, named as the file.

Each file has `Config`, a frozen dataclass of the method's options, and `build(encoder, config) -> Method`. A file whose
loss compares classes says so by `NEEDS_LABELS = True`; training then checks early that there are some.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from copgen_fast import registry
from copgen_fast.encoders import Encoder
from copgen_fast.methods._nt_xent import nt_xent

__all__ = ["Method", "build", "needs_labels", "nt_xent"]


class Method(nn.Module):
    """Base class of methods. Heads, predictors, queues and moving averages are its modules and buffers, so that its
    state dict resumes all of it.

    Attributes:
        encoder: the backbone f, which is what pretraining leaves.
    """

    encoder: Encoder

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """What the loss sees of the views v [2N, 3, H, W] (anchors first), with gradient; tensors of 2N rows each."""
        raise NotImplementedError

    def targets(self, v: Tensor) -> tuple[Tensor, ...]:
        """What the loss sees of the views without gradient, an EMA network's outputs say. Default: nothing."""
        return ()

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """The loss [], float32, of the whole batch's outputs.

        Args:
            online, targets: what `forward` and `targets` returned.
            labels: classes int64 [N] of the pairs, where the method has `NEEDS_LABELS`; else None.
            group: processes that share the batch, whose rows are negatives too; None: this one has all of it.
        """
        raise NotImplementedError

    def after_step(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], progress: float) -> None:
        """Called after each optimiser step, to update a moving average or a queue. Default: nothing.

        Args:
            progress: share of the training that is done, 0 .. 1.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, as torch.optim takes them. Default: one of all.

        The learning rate of a group with `"scheduled": False` stays at its peak.
        """
        return [{"params": list(self.parameters())}]


def build(name: str, encoder: Encoder, options: tuple[str, ...] = ()) -> Method:
    """Method `name` around an encoder.

    Raises:
        UsageError: no such method, or an option that does not fit.
    """
    return registry.load("methods", name).build(encoder, registry.options("methods", name, options))


def needs_labels(name: str) -> bool:
    """Whether the method's loss compares classes."""
    return getattr(registry.load("methods", name), "NEEDS_LABELS", False)
