"""Evaluations of frozen encoders: every public file here has `evaluate(subject, data, config, seed) -> numbers`."""

from __future__ import annotations

from copgen_fast import registry
from copgen_fast.config import ProbeConfig
from copgen_fast.evals._features import Subject
from copgen_fast.images.sets import LabelledImages

__all__ = ["Subject", "run"]


def run(name: str, subject: Subject, data: LabelledImages, config: ProbeConfig, seed: int) -> dict[str, float]:
    """Judge `subject` by the evaluation called `name`.

    Returns:
        Its numbers by name; accuracies are fractions 0 .. 1.

    Raises:
        UsageError: no such evaluation, or the data doesn't fit the configuration.
        NonFiniteError: a NaN or an infinity in the features or the loss.
        Interrupted: a stop was requested.
    """
    return registry.load("evals", name).evaluate(subject, data, config, seed)
