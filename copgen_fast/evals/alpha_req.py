"""alpha-ReQ (Agrawal et al. 2022): how fast the eigenvalues of the features' covariance decay. Needs no labels."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from copgen_fast.evals._frozen import EvalRun
from copgen_fast.evals.collapse import sample, squared_singular_values
from copgen_fast.registry import NoOptions

NEEDS_LABELS = False
_FIRST, _LAST, _FEWEST = 10, 100, 3
_ZERO = 1e-10  # of the largest: eigenvalues that float32 features leave where there is no variance


def evaluate(encoder: nn.Module, config: NoOptions, run: EvalRun) -> dict[str, float]:
    """Fit a power law to the eigenvalues of ranks 10 to 100 (or the last that isn't 0), in the sample of `collapse`.

    Returns:
        `alpha_req`, near 1 for good features, more where few directions have most of the variance; `alpha_req_r2`,
        the goodness of the fit. Neither, with a warning, where the features have fewer than 12 directions.
    """
    eigenvalues = spectrum(sample(encoder, run))
    if len(eigenvalues) < _FIRST + _FEWEST - 1:
        warnings.warn(f"alpha-req left out: features of {len(eigenvalues)} directions, 12 are needed", stacklevel=2)
        return {}
    alpha, r2 = power_law(eigenvalues[:_LAST], _FIRST)
    return {"alpha_req": alpha, "alpha_req_r2": r2}


def spectrum(features: Tensor) -> Tensor:
    """Eigenvalues of the covariance of features [N, D] that are more than 0 within rounding, largest first, float64."""
    centred = features.double() - features.double().mean(0)
    values = squared_singular_values(centred).flip(0) / (len(features) - 1)
    return values[values > _ZERO * values[0]]


def power_law(eigenvalues: Tensor, first: int) -> tuple[float, float]:
    """alpha and R^2 of the line log eigenvalue = c - alpha log rank, over ranks from `first` on (1 is the largest).

    Least squares weighted by 1 / rank, so that every octave of ranks counts alike.
    """
    ranks = torch.arange(first, len(eigenvalues) + 1, dtype=torch.float64, device=eigenvalues.device)
    x, y, weights = ranks.log(), eigenvalues[first - 1 :].log(), 1 / ranks
    x, y = (values - (weights * values).sum() / weights.sum() for values in (x, y))
    slope = (weights * x * y).sum() / (weights * x * x).sum()
    residual = (weights * (y - slope * x) ** 2).sum()
    return -slope.item(), (1 - residual / (weights * y * y).sum()).item()
