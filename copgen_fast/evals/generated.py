"""How far generated images are from real ones in an encoder's features, beside real ones from real ones.

Not FID or KID, whose features are an Inception network's: distances in different encoders' features don't compare.
Those of an encoder that was trained on the generated images flatter them: look at the baselines too.
"""

from __future__ import annotations

from collections.abc import Sequence
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
_NEAREST = 3, 5
"""The balls of precision and recall, and those of density and coverage, reach to which nearest feature."""


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
    if most <= max(_NEAREST):
        raise UsageError(
            f"evaluation generated needs {2 * max(_NEAREST) + 2} real training images or more, got {len(real)}"
        )
    pairs = pair_features(frozen, "generated", config.folder, most, run)
    count = len(pairs.anchors)
    if count <= max(_NEAREST):
        raise UsageError(f"evaluation generated needs {max(_NEAREST) + 1} pairs or more, got {count}")
    order = torch.randperm(len(real), generator=seeds.generator(run.config.seed, "generated"))
    reference, floor = real[order[:count]], real[order[count : 2 * count]]
    reference = reference.to(run.device).double()
    around = radii(reference, _NEAREST)
    sets = {"anchors": pairs.anchors, "positives": pairs.positives, "real": floor}
    found = {name: compare(features, reference, around, run) for name, features in sets.items()}
    numbers = {f"{name}_{measure}": found[name][measure] for measure in found["real"] for name in sets}
    return {"generated_images": count} | numbers


def compare(generated: Tensor, real: Tensor, around: list[Tensor], run: EvalRun) -> dict[str, float]:
    """Every measure of generated features [N, D] beside real ones [M, D], in float64 on the device.

    Args:
        around: `radii` of the real ones.
    """
    generated = generated.to(run.device).double()
    distance, spread = kernel_distance(generated, real, seeds.generator(run.config.seed, "kernel distance"))
    return {
        "frechet_distance": frechet_distance(generated, real),
        "kernel_distance": distance,
        "kernel_distance_std": spread,
        **precision_to_coverage(generated, real, around, _NEAREST),
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


def radii(features: Tensor, nearest: Sequence[int]) -> list[Tensor]:
    """Distances [N] of each row to its k-th nearest other one, for every k in `nearest`."""
    parts = features.split(_CHUNK)
    distances = [torch.cdist(part, features).topk(max(nearest) + 1, largest=False).values for part in parts]
    return [torch.cat([part[:, k] for part in distances]) for k in nearest]  # column 0 is the row itself


def precision_to_coverage(
    generated: Tensor, real: Tensor, around: list[Tensor], nearest: tuple[int, int]
) -> dict[str, float]:
    """Shares of features of one set within balls around those of the other, from one pass over their distances.

    `precision`: of generated features, those within a ball around a real one; `recall`: of real ones, those within one
    around a generated one (Kynkaanniemi et al. 2019). `density`: balls around real features that a generated one is
    in, mean / k, which may pass 1; `coverage`: share of those balls that hold a generated one (Naeem et al. 2020).

    Args:
        around: `radii` of the real features.
        nearest: k of the balls of precision and recall, and of those of density and coverage.
    """
    (own,) = radii(generated, nearest[:1])
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    balls = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    recalled, filled = [], []
    for part, small, large in zip(*(rows.split(_CHUNK) for rows in (real, *around)), strict=True):
        distances = torch.cdist(part, generated)
        inside = distances < large[:, None]
        precise |= (distances < small[:, None]).any(0)
        recalled.append((distances < own).any(1))
        balls += inside.sum(0)
        filled.append(inside.any(1))
    shares = {"precision": precise, "recall": torch.cat(recalled)}
    found = {name: share.double().mean().item() for name, share in shares.items()}
    density = balls.double().mean().item() / nearest[1]
    return found | {"density": density, "coverage": torch.cat(filled).double().mean().item()}
