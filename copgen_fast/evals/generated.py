"""How far generated images are from real ones in an encoder's features, beside real ones from real ones.

Not FID or KID, whose features are an Inception network's: distances in different encoders' features don't compare.
Those of an encoder that was trained on the generated images flatter them: look at the baselines too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.evals._frechet import frechet_distance
from copgen_fast.evals._frozen import EvalRun, freeze, real_images
from copgen_fast.evals._pairs import pair_features
from copgen_fast.options import Place, Range, check_ranges
from copgen_fast.runtime import seeds

NEEDS_LABELS, NEEDS_PAIRS = False, True
_CHUNK = 1024  # rows of an N x N matrix that are in memory at once
_SUBSETS, _SUBSET = 100, 1000  # of the kernel distance, and images of each at most
_PRECISION_K, _DENSITY_K = 3, 5


@dataclass(frozen=True)
class Config:
    """Options of the distances between generated and real images."""

    folder: Place | None = None
    """Pairs to measure; None: those that the encoder was pretrained on (baselines: those of the first source)."""
    count: Annotated[int, Range(6)] = 10_000
    """Images of each set at most, drawn at random: all sets have as many, half of the real training images or less."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(encoder: nn.Module, config: Config, run: EvalRun) -> dict[str, float]:
    """Compare anchors, positives and one half of the real training images (`real`, a floor) with the other half.

    Returns:
        `frechet_distance`, `kernel_distance` and its `_std` over subsets, `precision`, `recall`, `density` and
        `coverage`, each after `anchors_`, `positives_` and `real_`; and `generated_images`, how many each set has.

    Raises:
        UsageError: there are no pairs, or fewer than 12 real training images.
    """
    frozen, data = freeze(encoder, run), real_images(run)
    real = frozen.split_features(data, "train").features
    most = min(config.count, len(real) // 2)
    if most <= _DENSITY_K:
        raise UsageError(
            f"evaluation generated needs {2 * _DENSITY_K + 2} real training images or more, got {len(real)}"
        )
    pairs = pair_features(frozen, "generated", config.folder, most, run)
    count = len(pairs.anchors)
    if count <= _DENSITY_K:
        raise UsageError(f"evaluation generated needs {_DENSITY_K + 1} pairs or more, got {count}")
    order = torch.randperm(len(real), generator=seeds.generator(run.config.seed, "generated"))
    reference, floor = real[order[:count]], real[order[count : 2 * count]]
    sets = {"anchors": pairs.anchors, "positives": pairs.positives, "real": floor}
    found = {name: compare(features, reference, run) for name, features in sets.items()}
    numbers = {f"{name}_{measure}": found[name][measure] for measure in found["real"] for name in sets}
    return {"generated_images": count} | numbers


def compare(generated: Tensor, real: Tensor, run: EvalRun) -> dict[str, float]:
    """Every measure of generated features [N, D] beside real ones [M, D], in float64."""
    generated, real = (features.to(run.device).double() for features in (generated, real))
    distance, spread = kernel_distance(generated, real, seeds.generator(run.config.seed, "kernel distance"))
    return {
        "frechet_distance": frechet_distance(generated, real),
        "kernel_distance": distance,
        "kernel_distance_std": spread,
        **precision_recall(generated, real, _PRECISION_K),
        **density_coverage(generated, real, _DENSITY_K),
    }


def kernel_distance(a: Tensor, b: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Unbiased squared MMD by the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), and its spread over subsets.

    Args:
        a, b: [N, D] and [M, D].
        generator: draws 100 subsets of each, of 1,000 rows or, where there are fewer, of all.

    Returns:
        Mean and standard deviation over the subsets.
    """
    size = min(len(a), len(b), _SUBSET)
    if size == len(a) == len(b):
        return _mmd(a, b), 0.0
    drawn = []
    for _ in range(_SUBSETS):
        parts = (x[torch.randperm(len(x), generator=generator)[:size].to(x.device)] for x in (a, b))
        drawn.append(_mmd(*parts))
    found = torch.tensor(drawn, dtype=torch.float64)
    return found.mean().item(), found.std().item()


def _mmd(a: Tensor, b: Tensor) -> float:
    within = [_kernel(x, x) for x in (a, b)]
    means = [(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in within]
    return (sum(means) - 2 * _kernel(a, b).mean()).item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def precision_recall(generated: Tensor, real: Tensor, k: int) -> dict[str, float]:
    """Shares of generated features within a ball around a real one, and of real ones within one around a generated one
    (Kynkaanniemi et al. 2019); a ball reaches to the k-th nearest of the same set.
    """
    return {
        "precision": _balls_around(real, generated, k)[0].gt(0).double().mean().item(),
        "recall": _balls_around(generated, real, k)[0].gt(0).double().mean().item(),
    }


def density_coverage(generated: Tensor, real: Tensor, k: int) -> dict[str, float]:
    """Balls around real features that a generated one is in, mean / k, which may pass 1; share of those balls that
    hold a generated one (Naeem et al. 2020); a ball reaches to the k-th nearest real one.
    """
    balls, filled = _balls_around(real, generated, k)
    return {"density": balls.double().mean().item() / k, "coverage": filled.double().mean().item()}


def _balls_around(centres: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In how many balls each of `points` is, int64 [M], and whether each ball holds one, bool [N]."""
    balls = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    filled = []
    for part in centres.split(_CHUNK):
        radii = torch.cdist(part, centres).kthvalue(k + 1, dim=1).values  # the nearest is itself
        inside = torch.cdist(part, points) < radii[:, None]
        balls += inside.sum(0)
        filled.append(inside.any(1))
    return balls, torch.cat(filled)
