"""Logistic regression by L-BFGS on frozen features, its penalty chosen on a validation part (SimCLR, appendix B.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.config import Side
from copgen_fast.errors import UsageError
from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.evals.linear import both_accuracies
from copgen_fast.images.sets import OpenSet
from copgen_fast.images.transfer_sets import rules
from copgen_fast.images.views import Centre
from copgen_fast.options import Count, Range, check_ranges
from copgen_fast.runtime import seeds
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.runtime.memory import available_memory
from copgen_fast.runtime.progress import progress

_LOWEST, _HIGHEST = -6, 5  # decimal logarithms of the penalties
_TOLERANCE = 1e-4  # of the mean loss's gradient, at its largest, in variables of curvature 1
_MOST_AXES = 4096


@dataclass(frozen=True)
class Config:
    """Options of the L-BFGS protocol."""

    size: Side = 224
    """Pixels a side: the shorter one is resized to it (bicubic) and the centre cropped."""
    penalties: Count = 45
    """L2 penalties tried, evenly spaced in logarithms from 1e-6 to 1e5."""
    validation: Annotated[float, Range(0.01, 0.9)] = 0.2
    """Share of each class's training images that chooses the penalty, where the data set names no validation part."""
    max_iter: Count = 1000
    """Iterations of each fit at most; each starts from the solution before."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Choose the penalty on the validation part, fit all training features under it, score the test features once.

    Features are neither augmented, standardised nor normalised. The penalty is chosen by the data set's metric
    (`transfer_sets.rules`); both metrics are reported.

    Returns:
        `lbfgs_top1` and `lbfgs_top1_per_class`, the mean over classes of each one's; `lbfgs_top1_validation`, what the
        penalty was chosen by; `lbfgs_log10_l2`, the penalty.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    view = Centre(config.size)
    (x, y), (test, expected) = (frozen.split_features(data, split, view) for split in ("train", "test"))
    _expect_memory(x, run.device)
    held_out = validation_rows(data, y, config.validation, run.config.seed, "lbfgs chooses its penalty")
    metric = 1 if rules(data.config.name).metric == "mean_per_class" else 0
    x, y = x.to(run.device).double(), y.to(run.device)
    x, test = along_principal_axes(x, test.to(x))
    known = torch.ones(len(y), dtype=torch.bool, device=run.device)
    known[held_out] = False
    fit_x, fit_y, val_x, val_y = x[known], y[known], x[~known], y[~known]
    weights, best = torch.zeros(int(y.max()) + 1, x.shape[1] + 1, dtype=torch.float64), (-1.0, 0.0)
    exponents = torch.linspace(_HIGHEST, _LOWEST, config.penalties, dtype=torch.float64).tolist()
    with progress(config.penalties + 1, f"lbfgs {data.config.name}", "fits") as bar:
        for exponent in exponents:  # from the strongest on, whose solution is next to where the sweep starts
            weights = fit(fit_x, fit_y, 10**exponent, weights, config.max_iter)
            score = both_accuracies(predicted(val_x, weights), val_y)[metric]
            if score > best[0]:
                best, chosen = (score, exponent), weights
            bar.update(1, validation=score)
        weights = fit(x, y, 10 ** best[1], chosen, config.max_iter)
        bar.update(1)
    classes = predicted(test, weights).cpu()
    top1, per_class = both_accuracies(classes, expected)
    frozen.correct["lbfgs_top1"] = classes == expected
    return {
        "lbfgs_top1": top1,
        "lbfgs_top1_per_class": per_class,
        "lbfgs_top1_validation": best[0],
        "lbfgs_log10_l2": best[1],
    }


def along_principal_axes(train: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Features, centred and rotated so that those of training are uncorrelated; beyond 4,096 of them, centred alone.

    That changes no solution, as the bias is not penalised and the penalty is of a norm, and saves most iterations.
    """
    mean = train.mean(0)
    train, others = train - mean, others - mean
    if train.shape[1] > _MOST_AXES:
        return train, others
    axes = torch.linalg.eigh(train.T @ train).eigenvectors
    return train @ axes, others @ axes


def fit(features: Tensor, labels: Tensor, l2: float, start: Tensor, max_iter: int) -> Tensor:
    """Weights [C, D + 1], the bias last, that minimise the sum of cross entropies + l2 / 2 x the weights' squared norm.

    scikit-learn's multinomial LogisticRegression with C = 1 / l2, its products computed on the features' device. The
    solver sees variables of about equal curvature, for which features should be uncorrelated.

    Args:
        features: float64 [N, D].
        labels: int64 [N].
        start: weights that the solver starts from, float64 [C, D + 1].

    Raises:
        Interrupted: a stop was requested.
    """
    from scipy.optimize import minimize

    classes, penalty = len(start), torch.full((start.shape[1],), l2 / len(features), dtype=torch.float64)
    penalty[-1] = 0
    variances = torch.cat([features.square().mean(0).cpu(), torch.ones(1, dtype=torch.float64)])
    scale = (variances / classes + penalty).rsqrt()
    scale, penalty = scale.to(features), penalty.to(features)
    rows = F.one_hot(labels, classes).to(features)

    def mean_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        if stop_requested():
            raise Interrupted("stopped in lbfgs; run the same command to evaluate again")
        weights = torch.from_numpy(flat).view(start.shape).to(features.device) * scale
        logits = torch.addmm(weights[:, -1], features, weights[:, :-1].T)
        log_sum = logits.logsumexp(1)
        loss = (log_sum - (logits * rows).sum(1)).mean() + (penalty * weights.square()).sum() / 2
        residuals = ((logits - log_sum[:, None]).exp_() - rows) / len(features)
        gradient = torch.cat([residuals.T @ features, residuals.sum(0)[:, None]], 1) + penalty * weights
        return loss.item(), (gradient * scale).flatten().cpu().numpy()

    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "gtol": _TOLERANCE, "ftol": 64 * np.finfo(float).eps}
    first = (start / scale.cpu()).flatten().numpy()
    found = minimize(mean_loss, first, jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).view(start.shape) * scale.cpu()


def predicted(features: Tensor, weights: Tensor) -> Tensor:
    """The most probable class of each row."""
    weights = weights.to(features)
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T).argmax(1)


def validation_rows(data: OpenSet, labels: Tensor, share: float, seed: int, of: str) -> Tensor:
    """Which training rows something is chosen on: the data set's validation part, else a share of each class.

    Args:
        labels: of the training images that could be decoded.
        share: of each class, rounded, but never all of its images.
        of: what chooses and what is chosen, for the message.
    """
    if data.validation is not None:
        return torch.isin(data.readable("train"), data.validation).nonzero().squeeze(1)
    chosen, generator = [], seeds.generator(seed, "validation")
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        count = min(len(members) - 1, max(1, round(share * len(members))))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    if not len(rows := torch.cat(chosen)):
        raise UsageError(f"{data.where}: {of} on a part of the training images, and there is one image a class")
    return rows


def _expect_memory(features: Tensor, device: torch.device) -> None:
    """Refuse what would not fit in float64 three times, plain, centred and rotated: raw pixels of photographs, say."""
    needed, free = 24 * features.numel() / 1e6, available_memory(device)
    if free is not None and needed > free:
        raise UsageError(
            f"{len(features)} features of {features.shape[1]} numbers take {needed / 1e3:.3g} GB (three copies in "
            f"float64) and {free / 1e3:.3g} GB of memory are free: leave `pixels` out of --probe.baselines, or lower "
            "lbfgs.size"
        )
