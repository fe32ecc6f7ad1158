"""Calibrate a study's ways of making positives, by seed: python -m docs.calibrate_study STUDY --seeds 0..4 --out DIR.

The words are those of the study's own command. For each seed, as `python -m copgen_fast.study calibrate` does for a
run: the distance that the encoder of identity pairs with T_x proposes for each way of making positives; and how often
the class changes there and at one common distance, by a classifier of `--data` (`docs.check_calibration`).
DIR/calibration.json gets it all.

Where the study has run, nothing is trained; elsewhere that part of it which calibrating needs: the encoders of identity
pairs, the navigators and the walks. The study's own command can go on with the rest.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from copgen_fast import generators, positives, registry
from copgen_fast.errors import CopgenError, UsageError, command
from copgen_fast.runtime import artifacts, devices
from copgen_fast.runtime.interrupts import handle_signals
from copgen_fast.stages._calibration import Calibration, calibrate, displacements, draw_anchors
from copgen_fast.studies import _execute, _grid, _results
from copgen_fast.studies._plan import Planned, Unit, of_folder, plan
from copgen_fast.study import parse, study_of
from docs.check_calibration import Classifier, class_changes

COMMON = 2.1
"""E||dz|| at which all ways' class changes are compared, too."""
PARTS = ("navigator", "steering")
"""Links of a run to what its displacements are made with."""
BySeed = Mapping[int, Sequence[Planned]]


class Move(NamedTuple):
    """Displacements of one way of making positives.

    Attributes:
        way: its name.
        distances: E||dz|| at which the study has it.
        dz: of the anchors, float32 [N, L].
    """

    way: str
    distances: list[float]
    dz: Tensor


@command
def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, calibrate each seed and write the file."""
    config, settings = parse(sys.argv[1:] if arguments is None else arguments)
    study, seeds = study_of(config, settings), _grid.seeds(config.seeds)
    folder = config.out or Path("runs") / f"study-{registry.label(config.name)}"
    planned = plan(study, seeds, folder)
    _results.reopen(study, seeds, folder)
    runs = {seed: [run for run in planned if run.seed == seed] for seed in seeds}
    with handle_signals(), devices.full_float32():
        train(needed(runs), folder / _results.LOGS, config.jobs)
        first = of_folder(reference(planned).unit)
        G = generators.load(first.config.generator, torch.device("cpu"))
        data = dataclasses.replace(first.config.data, image_size=G.image_shape[-1])
        classify = Classifier(first, G, data)
        content = {
            "study": config.name,
            "settings": _results.describe(study, seeds)["settings"],
            "classifier_accuracy": classify.accuracy,
            "seeds": [calibrated(of_seed, G, classify) for of_seed in tqdm(runs.values(), unit="seed")],
        }
    artifacts.write_json(folder / "calibration.json", content)
    print(folder / "calibration.json")
    return 0


def needed(runs: BySeed) -> list[Unit]:
    """What calibrating reads and is not there yet, each after what it needs itself."""
    wanted = [_up_to_its_encoder(reference(of_seed)) for of_seed in runs.values()]
    every = [run for of_seed in runs.values() for run in of_seed]
    wanted += [unit for run in every for where, unit in run.unit.links if where in PARTS]
    in_order = [one for unit in wanted for one in (*unit.needs, unit)]
    return list({unit.folder: unit for unit in in_order if not unit.done}.values())


def reference(planned: Sequence[Planned]) -> Planned:
    """The first run of identity pairs with T_x, whose encoder tells how far others may go.

    Raises:
        UsageError: there is none.
    """
    for run in planned:
        if run.source == "identity" and run.unit.config.pretrain.augmentation != "none":
            return run
    raise UsageError("the study has no arm of identity pairs with an augmentation in pretraining, which others need")


def _up_to_its_encoder(run: Planned) -> Unit:
    config = dataclasses.replace(run.unit.config, stages=("pairs", "pretrain"))
    encoder = of_folder(run.unit).encoder_file(run.source)
    return dataclasses.replace(run.unit, config=config, results=(encoder,))


def train(units: Sequence[Unit], logs: Path, jobs: int | None) -> None:
    """Run them, on the CPU.

    Raises:
        CopgenError: some failed.
    """

    def tell(unit: Unit, error: str | None) -> None:
        tqdm.write(f"{unit.name}: {error or 'done'}", file=sys.stderr)

    if failed := _execute.execute(units, logs, _execute.slots(jobs, "cpu"), tell):
        raise CopgenError(f"{failed} of what calibrating needs failed: see {logs}")


def calibrated(planned: Sequence[Planned], G: nn.Module, classify: Classifier) -> dict[str, Any]:
    """Proposals and class changes of all ways in one seed's runs, as plain values."""
    run, options = of_folder(reference(planned).unit), Calibration()
    z = draw_anchors(run, G, options.anchors)
    moves, own = movements(planned, G, z), classify(z)
    found = calibrate(run, options, G, run, z, {name: move.dz for name, move in moves.items()})
    ways = []
    for name, (way, distances, dz) in moves.items():
        there = found["ways"][name]
        at_proposal, at_common = class_changes(classify, own, z, dz, (there["proposal"], COMMON))
        kept = {key: there[key] for key in ("proposal", "interval", "note", "proposal_by_clusters")}
        curve = [{key: point[key] for key in ("distance", "agreement")} for point in there["curve"]]
        classes = {"at_proposal": at_proposal, "at_common": at_common}
        ways.append({"way": way, "distances": distances, **kept, "class_changes": classes, "curve": curve})
    about = {key: found[key] for key in ("anchors", "clusters", "keep", "prior_norm", "augmentation")}
    agreement = {key: found[key]["agreement"] for key in ("reference", "chance")}
    return {"seed": run.config.seed, **about, **agreement, "ways": ways}


def movements(planned: Sequence[Planned], G: nn.Module, z: Tensor) -> dict[str, Move]:
    """The displacements of anchors z [N, L] in one seed's runs, once where runs differ in their scale alone.

    Returns:
        By way and, of those that are trained for each distance, distance.
    """
    groups: dict[tuple[str, Path | None], list[Planned]] = {}
    for run in planned:
        if run.source != "identity":
            groups.setdefault((run.source, _part(run)), []).append(run)
    ways, moves = [way for way, _ in groups], {}
    for (way, part), runs in groups.items():
        distances = list(dict.fromkeys(positives.options(run.unit.config.pairs)[way].distance for run in runs))
        run = of_folder(runs[0].unit)
        ((_, dz),) = displacements(dataclasses.replace(run, folder=part or run.folder), G, z).items()
        moves[f"{way} {distances[0]:g}" if ways.count(way) > 1 else way] = Move(way, distances, dz)
    return moves


def _part(run: Planned) -> Path | None:
    """The folder of what a run's displacements are made with; None: of nothing that is trained."""
    return next((unit.folder for where, unit in run.unit.links if where in PARTS), None)


if __name__ == "__main__":
    sys.exit(main())
