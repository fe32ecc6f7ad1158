"""Evaluations of encoders: one file each, named as on the command line.

Each file has `evaluate(encoder, config, run) -> numbers by name` and may have `Config`, a frozen dataclass of its
options. An evaluation loads its own data and freezes the encoder for itself: `labelled_images` and `freeze` do so once
for all evaluations of a run. Accuracies are fractions, 0 .. 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from copgen_fast import registry
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder, freeze, labelled_images

__all__ = ["EvalRun", "FrozenEncoder", "evaluate", "freeze", "labelled_images"]


def evaluate(name: str, encoder: Callable[[Tensor], Tensor], run: EvalRun) -> dict[str, float]:
    """Evaluate an encoder, images [N, 3, S, S] -> features [N, D], by the evaluation called `name`.

    Raises:
        UsageError: no such evaluation, or data that do not fit its options.
        NonFiniteError: a NaN or an infinity in the features or the loss.
        Interrupted: a stop was requested.
    """
    options = registry.options_by_name("evals", run.config.probe.evals, run.config.probe.options)
    config = options.get(name) or registry.options("evals", name)
    return registry.load("evals", name).evaluate(encoder, config, run)
