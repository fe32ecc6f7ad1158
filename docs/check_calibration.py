"""How often positives change the class at the distances of a calibration, by a classifier of real images.

Run `python -m copgen_fast.study calibrate RUN`, then `python -m docs.check_calibration RUN [--data.name NAME
--data.root PATH]`. The classifier is a support vector machine on pixels, pooled 2 x 2; its accuracy on the test images
is printed. `docs.calibrate_study` does the same for the seeds of a study.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from scipy.stats import binomtest
from sklearn.svm import SVC
from torch import Tensor, nn

from copgen_fast import evals, generators
from copgen_fast.config import DataConfig, ProbeConfig
from copgen_fast.errors import command
from copgen_fast.images import sets
from copgen_fast.options import Range, parse
from copgen_fast.pairs.format import levels
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.stages._calibration import displacements, draw_anchors
from copgen_fast.studies._calibrate import FILE, open_run

TESTED = 2000
"""Test images that the classifier's accuracy is of, at most."""


@dataclass(frozen=True)
class CheckConfig:
    """Class changes at the distances of RUN/calibration/calibration.json; leaves classes.json beside it."""

    run: Annotated[Path, tyro.conf.Positional]
    data: DataConfig = field(default_factory=DataConfig)
    """Real labelled images, of the generator's size."""
    train: Annotated[int, Range(10, 10**6)] = 10_000
    """Real images to fit the classifier to, at most."""


class Classifier:
    """The classes of generated images G(z), by a support vector machine on real images' pixels, pooled 2 x 2.

    Args:
        run: the mean and standard deviation of its T_x normalise the pixels.
        data: real labelled images, of the size of G's.
        train: how many of them to fit it to, at most.

    Attributes:
        accuracy: on the first 2,000 test images.
    """

    def __init__(self, run: Run, G: nn.Module, data: DataConfig, train: int = 10_000) -> None:
        config = dataclasses.replace(run.config, data=data, probe=ProbeConfig())
        pooled = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        self.generator, self.pixels = G, evals.freeze(pooled, dataclasses.replace(run, config=config))
        images = sets.open_set(data)
        (x, y), (x_test, y_test) = (self.pixels.split_features(images, split) for split in ("train", "test"))
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:train]
        self.fitted = SVC(C=10).fit(x[chosen].numpy(), y[chosen].numpy())
        self.accuracy = float(self.fitted.score(x_test[:TESTED].numpy(), y_test[:TESTED].numpy()))

    @torch.no_grad()
    def __call__(self, z: Tensor) -> np.ndarray:
        """Classes int64 [N] of latents [N, L]."""
        return self.fitted.predict(self.pixels.features(levels(self.generator(z)).to(torch.uint8)).numpy())


def class_changes(
    classify: Classifier, own: np.ndarray, z: Tensor, dz: Tensor, distances: Iterable[float]
) -> list[dict[str, Any]]:
    """How often the class of z + s dz is not that of z, with s such that E||s dz|| is each of the distances.

    Args:
        own: classes [N] of the anchors z [N, L].

    Returns:
        For each distance, plain values: `distance`, the share `changed` and its Wilson 95 % `interval` over anchors.
    """
    norm, found = dz.norm(dim=1).mean().item(), []
    for distance in distances:
        changed = int((classify(z + distance / norm * dz) != own).sum())
        low, high = binomtest(changed, len(z)).proportion_ci(method="wilson")
        found.append({"distance": distance, "changed": changed / len(z), "interval": [float(low), float(high)]})
    return found


@command
def main(arguments: list[str] | None = None) -> int:
    """Print each way's class changes at its proposal, and write those at all distances, too."""
    options = parse(CheckConfig, arguments, "python -m docs.check_calibration")
    run = open_run(options.run, "cpu")
    found = artifacts.read_record(run.calibration_folder / FILE)
    G = generators.load(run.config.generator, run.device)
    classify = Classifier(run, G, options.data, options.train)
    print(f"classifier: {classify.accuracy:.3f} of the test images")
    z = draw_anchors(run, G, found["anchors"])
    own, table = classify(z), {}
    for name, dz in displacements(run, G, z).items():
        way = found["ways"][name]
        distances = [point["distance"] for point in way["curve"]]
        first, *others = class_changes(classify, own, z, dz, [way["proposal"], *distances])
        low, high = first["interval"]
        print(
            f"{name}: at {first['distance']:.3g} the class changes in {first['changed']:.3f} ({low:.3f} to {high:.3f})"
        )
        table[name] = {"at_proposal": first, "at_distances": others}
    content = {"accuracy": classify.accuracy, "anchors": len(z), "ways": table}
    artifacts.write_json(run.calibration_folder / "classes.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
