"""How often positives change the class at the distances of a calibration, by a classifier of real images.

Run `python -m copgen_fast.study calibrate RUN`, then `python -m docs.check_calibration RUN [--data.name NAME
--data.root PATH]`. The classifier is a support vector machine on pixels, pooled 2 x 2; its accuracy on the test images
is printed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from scipy.stats import binomtest
from sklearn.svm import SVC
from torch import nn

from copgen_fast import evals, generators
from copgen_fast.config import DataConfig, ProbeConfig
from copgen_fast.images import sets
from copgen_fast.options import Range, parse
from copgen_fast.pairs.format import levels
from copgen_fast.runtime import artifacts
from copgen_fast.stages._calibration import displacements, draw_anchors
from copgen_fast.studies._calibrate import FILE, open_run


@dataclass(frozen=True)
class CheckConfig:
    """Class changes at the distances of RUN/calibration/calibration.json; leaves classes.json beside it."""

    run: Annotated[Path, tyro.conf.Positional]
    data: DataConfig = field(default_factory=DataConfig)
    """Real labelled images, of the generator's size."""
    train: Annotated[int, Range(10, 10**6)] = 10_000
    """Real images to fit the classifier to, at most."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(CheckConfig, arguments, "python -m docs.check_calibration")
    run = open_run(options.run, "cpu")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=options.data, probe=ProbeConfig()))
    pixels = evals.freeze(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), run)  # pooled, to be fast
    data = sets.open_set(options.data)
    (x, y), test = (pixels.split_features(data, split) for split in ("train", "test"))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: options.train]
    classifier = SVC(C=10).fit(x[chosen].numpy(), y[chosen].numpy())
    held = slice(0, 2000)
    accuracy = classifier.score(test.features[held].numpy(), test.labels[held].numpy())
    print(f"classifier: {accuracy:.3f} of the test images")

    found = artifacts.read_record(run.calibration_folder / FILE)
    G = generators.load(run.config.generator, run.device)
    z = draw_anchors(run, G, found["anchors"])

    @torch.no_grad()
    def classes(latents: torch.Tensor) -> np.ndarray:
        return classifier.predict(pixels.features(levels(G(latents)).to(torch.uint8)).numpy())

    own, table = classes(z), {}
    for name, dz in displacements(run, G, z).items():
        way = found["ways"][name]
        distances = [point["distance"] for point in way["curve"]]
        changed = {d: int((classes(z + d / way["distance"] * dz) != own).sum()) for d in (*distances, way["proposal"])}
        table[name] = {"proposal": way["proposal"], "changed": {str(d): n / len(z) for d, n in changed.items()}}
        interval = binomtest(changed[way["proposal"]], len(z)).proportion_ci(method="wilson")
        table[name]["at_proposal"] = [changed[way["proposal"]] / len(z), interval.low, interval.high]
        shown = "{:.3f} ({:.3f} to {:.3f})".format(*table[name]["at_proposal"])
        print(f"{name}: at {way['proposal']:.3g} the class changes in {shown}")
    content = {"accuracy": accuracy, "anchors": len(z), "ways": table}
    (run.calibration_folder / "classes.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
