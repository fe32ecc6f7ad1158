"""Self-supervised methods: what pretraining minimises. One file each, named as the file.

Each file has `Config`, a frozen dataclass of the method's options, and `build(encoder, config) -> Method`. A file whose
loss compares classes says so by `NEEDS_LABELS = True`; training then checks early that there are some. `USES_LABELS =
True` takes them where there are some, to log how well the method does. `SEVERAL_POSITIVES = True` takes the views of
all positives of an anchor, where pairs have several; for other files one of them is drawn in each step. A Config
with `for_run(setting) -> Config` sets what depends on the run, a queue's size say, and raises ValueError for what does
not go with it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from copgen_fast import registry
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.methods._nt_xent import nt_xent

__all__ = [
    "Method",
    "Setting",
    "build",
    "configure",
    "needs_labels",
    "nt_xent",
    "several_positives",
    "takes_jigsaw",
    "uses_labels",
]


@dataclass(frozen=True)
class Setting:
    """What a method's options may depend on.

    Attributes:
        pairs: of the data set.
        batch: pairs of a step, of all ranks together.
    """

    pairs: int
    batch: int


class Method(nn.Module):
    """Base class of methods. Heads, predictors, queues and moving averages are its modules and buffers, so that its
    state dict resumes all of it.

    Attributes:
        encoder: the backbone f, which is what pretraining leaves.
        positives: of each anchor, K; 1 unless the file says `SEVERAL_POSITIVES = True`.
        jigsaw: whether a jigsaw view of each anchor (`augmentations.jigsaw_views`) follows the other views. Training
            makes them where the options have a number `jigsaw` above 0.
    """

    encoder: Encoder
    positives: int = 1
    jigsaw: bool = False

    def before_step(self, seed: int) -> None:
        """Called first in each step, with a seed for what the method draws at random in it. Default: nothing."""

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """What the loss sees of the views v [(1 + K) N, 3, H, W] (anchors first, then the first positive of each), with
        gradient; tensors of as many rows each, or of N, one for each pair.
        """
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
            labels: classes int64 [N] of the pairs, where the method has `NEEDS_LABELS`, or `USES_LABELS` and the data
                has classes; else None.
            group: processes that share the batch, whose rows are negatives too; None: this one has all of it.
        """
        raise NotImplementedError

    def after_step(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], progress: float) -> None:
        """Called after each optimiser step, to update a moving average or a queue. Default: nothing.

        Args:
            progress: share of the training that is done, 0 .. 1.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log of the step that was made, on the device. Default: none.

        Rows log their mean over ranks. Below `COLLAPSED` of `embedding_std` the run warns of collapse.
        """
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, as torch.optim takes them. Default: one of all that are trained.

        The learning rate of a group with `"scheduled": False` stays at its peak.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]


COLLAPSED = 0.1
"""Standard deviation of normalised embeddings, in parts of that of directions drawn uniformly, below which embeddings
count as collapsed."""


def configure(name: str, options: tuple[str, ...] = (), setting: Setting | None = None) -> Any:
    """The options of method `name` as an instance of its Config, for a run where its setting is given.

    Raises:
        UsageError: no such method, or an option that does not fit, or not the run.
    """
    config = registry.options("methods", name, options)
    if setting is None or not hasattr(config, "for_run"):
        return config
    try:
        return config.for_run(setting)
    except ValueError as error:
        raise UsageError(f"--method {name}: {error}") from error


def build(name: str, encoder: Encoder, options: tuple[str, ...] = (), setting: Setting | None = None) -> Method:
    """Method `name` around an encoder; raises as `configure`."""
    return registry.function("methods", name)(encoder, configure(name, options, setting))


def uses_labels(name: str) -> bool:
    """Whether the method takes classes where there are some, without needing them."""
    return getattr(registry.load("methods", name), "USES_LABELS", False)


@functools.cache
def takes_jigsaw(name: str, options: tuple[str, ...]) -> bool:
    """Whether the method takes jigsaw views by these options."""
    return getattr(configure(name, options), "jigsaw", 0) > 0


def needs_labels(name: str) -> bool:
    """Whether the method's loss compares classes."""
    return getattr(registry.load("methods", name), "NEEDS_LABELS", False)


def several_positives(name: str) -> bool:
    """Whether the method takes all positives of an anchor, rather than one."""
    return getattr(registry.load("methods", name), "SEVERAL_POSITIVES", False)
