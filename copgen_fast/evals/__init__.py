"""Evaluations of encoders: one file each, named as on the command line.

Each file has `evaluate(encoder, config, run) -> numbers by name` and may have `Config`, a frozen dataclass of its
options. An evaluation loads its own data and freezes the encoder for itself: `real_images` and `freeze` do so once for
all evaluations of a run. Accuracies are fractions, 0 .. 1.

`freeze(encoder, run).pairs` is the folder of the pairs that an encoder was pretrained on, for those with `NEEDS_PAIRS`.

Before any stage runs, training checks that the real images have labels of two classes or more, unless every evaluation
says `NEEDS_LABELS = False`, and calls `check(config, train_labels)` and `check_names(config, train_split)` of those
that have them, which raise UsageError.

One that reads other images than those of `--data` has `check_data(config, run_config)` instead, which raises the same.
One that says `SHARED = True` is called by every process of the run (`run.ranks`), others by rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from copgen_fast import registry
from copgen_fast.config import RunConfig
from copgen_fast.evals import _pairs
from copgen_fast.evals._frozen import (
    EvalRun,
    FrozenEncoder,
    freeze,
    has_own_data,
    left_out,
    needs_labels,
    real_images,
    release,
    split_digest,
)
from copgen_fast.images import sets

__all__ = [
    "EvalRun",
    "FrozenEncoder",
    "evaluate",
    "expect_data",
    "freeze",
    "has_own_data",
    "is_shared",
    "left_out",
    "real_images",
    "release",
    "split_digest",
]


def expect_data(config: RunConfig) -> None:
    """Check that the real images of `config.data` have what its evaluations need, decoding only the first ones.

    Raises:
        UsageError: they have not.
    """
    options = registry.options_by_name("evals", config.probe.evals, config.probe.options)
    for name in [name for name in options if has_own_data(name)]:
        registry.load("evals", name).check_data(options.pop(name), config)
    if not options:
        return
    labelled = [name for name in options if needs_labels(name)]
    data = sets.open_set(config.data, labelled=bool(labelled))
    if labelled:
        data.expect_classes(f"evaluation {registry.label(labelled[0])}")
    data.expect_decodable()
    train = data.splits["train"].labels
    for name, values in options.items():
        part = registry.load("evals", name)
        if getattr(part, "NEEDS_PAIRS", False):
            _pairs.expect_pairs(name, getattr(values, "folder", None), config)
        check = getattr(part, "check", None)
        if check is not None and train is not None:
            check(values, train)
        if check_names := getattr(part, "check_names", None):
            check_names(values, data.splits["train"])


def evaluate(name: str, encoder: Callable[[Tensor], Tensor], run: EvalRun) -> dict[str, float]:
    """Evaluate an encoder, images [N, 3, S, S] -> features [N, D], by the evaluation called `name`.

    Raises:
        UsageError: no such evaluation, or data that do not fit its options.
        NonFiniteError: a NaN or an infinity in the features or the loss.
        Interrupted: a stop was requested.
    """
    options = registry.options_by_name("evals", run.config.probe.evals, run.config.probe.options)
    config = options.get(name) or registry.options("evals", name)
    return registry.function("evals", name)(encoder, config, run)


def is_shared(name: str) -> bool:
    """Whether all processes of a run compute an evaluation together."""
    return getattr(registry.load("evals", name), "SHARED", False)
