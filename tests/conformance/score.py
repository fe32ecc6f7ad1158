"""Score an augmentation against the conformance vectors; make_augment.py describes them.

python -m tests.conformance.score      # from the repository's root: copgen_fast's backends, a row a group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).with_name("augment.npz")
PARAMETERS = ("crop", "flip", "order", "factors", "jitter", "gray", "blur", "solarize", "sigma")
VALUES, GRADIENTS = 1e-5, 1e-4

AugmentFn = Callable[[Tensor, dict[str, Tensor], Sequence[int], Sequence[float], Sequence[float]], Tensor]
"""(images, parameters by name, (h, w), mean, std) -> views, on the CPU, differentiable in float images."""


class Score(NamedTuple):
    case: str
    value: float
    """Largest absolute error of the views, of float32 and of uint8 images."""
    gradient: float
    """Norm of the gradient's error by the gradient's norm."""

    @property
    def passes(self) -> bool:
        # Written so that NaN fails.
        return self.value <= VALUES and self.gradient <= GRADIENTS


def score(augment_fn: AugmentFn, path: Path | str = PATH) -> list[Score]:
    """A score for every case, named "group: case"."""
    with np.load(path) as file:
        arrays = dict(file)
    scores: list[Score] = []
    for name in [array.removesuffix("/case") for array in arrays if array.endswith("/case")]:
        prefix = f"{name}/"
        group = {array.removeprefix(prefix): values for array, values in arrays.items() if array.startswith(prefix)}
        scores += _score_group(augment_fn, name, group)
    return scores


def _score_group(augment_fn: AugmentFn, name: str, group: dict[str, np.ndarray]) -> list[Score]:
    tensors = {k: torch.from_numpy(v) for k, v in group.items() if k != "case"}
    params = {k: tensors[k] for k in PARAMETERS}
    rest = (params, tuple(tensors["views"].shape[2:]), group["mean"].tolist(), group["std"].tolist())
    leaf = (tensors["images"].float() / 255).requires_grad_()
    views = augment_fn(leaf, *rest)
    (gradient,) = torch.autograd.grad(views, leaf, tensors["weights"].to(views.dtype))
    both = torch.stack([views.detach(), augment_fn(tensors["images"], *rest)])
    value = (both - tensors["views"]).abs().amax((0, 2, 3, 4))
    wanted = tensors["gradient"].flatten(1).norm(dim=1)
    error = (gradient - tensors["gradient"]).flatten(1).norm(dim=1) / torch.where(wanted > 0, wanted, 1)
    rows = zip(group["case"].tolist(), value.tolist(), error.tolist(), strict=True)
    return [Score(f"{name}: {case}", *errors) for case, *errors in rows]


def ours(backend: str) -> AugmentFn:
    """copgen_fast's augmentation by one backend."""
    from copgen_fast.ops import AugmentParams, augment

    def run(
        images: Tensor, params: dict[str, Tensor], size: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        drawn = AugmentParams(**{name: values for name, values in params.items() if name != "sigma"})
        return augment(images, drawn, size, mean=mean, std=std, backend=backend)

    return run


def backends() -> list[str]:
    """The backends of copgen_fast's augmentation that run here on the CPU."""
    from copgen_fast.ops.backend import resolve

    found = []
    for name in ("reference", "cpp", "triton"):
        try:
            found.append(resolve("augment", "cpu", name))
        except ValueError:
            continue
    return found


def main() -> None:
    """Print, for every backend and group, the worst errors and how many cases pass."""
    for backend in backends():
        scores = score(ours(backend))
        print(f"{backend}: {sum(s.passes for s in scores)} of {len(scores)} cases pass")
        print(f"  {'group':<16}{'cases':>6}{'passed':>8}{'value':>10}{'gradient':>10}")
        for group in dict.fromkeys(s.case.split(":")[0] for s in scores):
            part = [s for s in scores if s.case.split(":")[0] == group]
            worst = f"{max(s.value for s in part):10.1e}{max(s.gradient for s in part):10.1e}"
            print(f"  {group:<16}{len(part):>6}{sum(s.passes for s in part):>8}{worst}")


if __name__ == "__main__":
    main()
