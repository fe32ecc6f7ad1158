"""Linear probe on cached features: how well a linear classifier reads the classes from them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.images.sets import SPLITS
from copgen_fast.registry import NoOptions

# Inverse strength of the L2 penalty on standardised features. Between 0.01 and 1 it moves the accuracy of pixels
# and of untrained encoders by a point; more lets the solver stop anywhere on a flat optimum.
_C = 0.1
# Below this many numbers, BLAS threads mostly wait for each other (measured on two busy cores: 13.5 s against 1.2 s
# for 1437 x 3072, 9.2 s against 3.5 s for 20000 x 2048).
_WORTH_THREADS = 1e8


def evaluate(encoder: nn.Module, config: NoOptions, run: EvalRun) -> dict[str, float]:
    """Fit on all training features, score the test features.

    The fast protocol: no augmentation, standardised features, multinomial logistic regression with an L2 penalty,
    solved to convergence.

    Returns:
        `linear_top1`, and `linear_top5` where there are more than five classes.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    train, test = (frozen.split_features(data, split) for split in SPLITS)
    return accuracies("linear", class_scores(*train, test.features), test.labels, frozen.correct)


def class_scores(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Logits of `test` under the probe fitted on `train`.

    Args:
        train: float32 [N, D].
        labels: int64 [N] in 0 .. C - 1, of two classes or more.
        test: float32 [M, D].

    Returns:
        float64 [M, C]; -infinity for a class without training images, as those that can't be decoded leave it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=2000))
    small = train.numel() < _WORTH_THREADS
    with threadpool_limits(1) if small else contextlib.nullcontext():
        probe.fit(train.numpy(), labels.numpy())
        scores = torch.from_numpy(probe.decision_function(test.numpy())).double()
    if scores.ndim == 1:  # two classes: scikit-learn gives the second one's logit alone
        scores = torch.stack([-scores, scores], dim=1)
    every = scores.new_full((len(test), int(labels.max()) + 1), -torch.inf)
    every[:, torch.from_numpy(probe.classes_)] = scores
    return every


def accuracies(
    prefix: str, scores: Tensor, labels: Tensor, correct: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """`PREFIX_top1`, and `PREFIX_top5` where there are more than five classes, of scores [N, C].

    Args:
        correct: gets which images are counted in `PREFIX_top1`, bool [N], under that name.
    """
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    found = {f"{prefix}_top1": hits[:, 0].double().mean().item()}
    if correct is not None:
        correct[f"{prefix}_top1"] = hits[:, 0].clone()
    if scores.shape[1] > 5:
        found[f"{prefix}_top5"] = hits.any(dim=1).double().mean().item()
    return found


def both_accuracies(found: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of correct rows, and the mean over the classes in `labels` of each one's share."""
    correct, counts = (found == labels).double(), labels.bincount()
    shares = labels.bincount(correct)[counts > 0] / counts[counts > 0]
    return correct.mean().item(), shares.mean().item()
