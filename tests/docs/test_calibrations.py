"""What calibrations of a study read and say: its parts, displacements, class changes, and accuracy against distance."""

import json

import numpy as np
import pytest
import torch

from copgen_fast import generators
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.studies import _calibrate, _plan
from copgen_fast.study import parse, study_of
from docs import calibrate_study, check_calibration, make_calibration_tables
from docs.check_calibration import class_changes
from docs.make_calibration_tables import PREDICTORS, Point, at_proposals, left_out_error, r_squared, rank_correlation


def planned(folder, *words, seeds=(0,)):
    return _plan.plan(study_of(*parse(["positives-digits", *words])), seeds, folder)


def test_of_a_study_calibrating_needs_encoders_of_identity_pairs_navigators_and_walks(tmp_path):
    every = planned(tmp_path, "--study.options", "distances=1.4,3.0", "augmentations=digits", seeds=(0, 1))
    runs = {seed: [run for run in every if run.seed == seed] for seed in (0, 1)}
    units = calibrate_study.needed(runs)
    stages = sorted(unit.config.stages for unit in units)
    each = [("navigator",), ("navigator",), ("pairs", "pretrain"), ("steering",)]
    assert stages == sorted([("pairs",), *each, *each]), "identity pairs are the same for all seeds"
    assert {unit.config.pretrain.augmentation for unit in units if "pretrain" in unit.config.stages} == {"digits"}
    (encoder,) = {
        path for unit in units if unit.config.seed == 1 and "pretrain" in unit.config.stages for path in unit.results
    }
    encoder.parent.mkdir(parents=True)
    encoder.touch()
    assert len(calibrate_study.needed(runs)) == len(units) - 1, "what is there is not trained again"


def test_without_augmented_identity_pairs_a_study_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no arm of identity pairs with an augmentation"):
        calibrate_study.reference(planned(tmp_path, "--study.options", "distances=1.4", "augmentations=none"))


def test_ways_that_differ_in_scale_alone_are_moved_once(tmp_path):
    G = generators.load(PRESETS["quickstart"].generator, torch.device("cpu"))
    z = G.sample(0, 8)
    every = planned(tmp_path, "--study.options", "distances=1.4,3.0")
    runs = [run for run in every if run.source in ("identity", "gaussian", "untrained-navigator")]
    moves = calibrate_study.movements(runs, G, z)
    assert list(moves) == ["gaussian", "untrained-navigator"]
    assert all(move.distances == [1.4, 3.0] and move.dz.shape == z.shape for move in moves.values())


def test_class_changes_are_counted_at_scaled_displacements():
    z = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    dz = torch.tensor([[1.0], [1.0], [1.0], [5.0]])  # 2 on average

    def classify(z):
        return (z[:, 0] >= 4).long().numpy()

    near, far = class_changes(classify, classify(z), z, dz, (0.4, 8.0))
    assert near["changed"] == 0.25 and far["changed"] == 1
    # Wilson's interval of 1 of 4 by its formula.
    assert near["interval"] == pytest.approx([0.0456, 0.6994], abs=1e-4)


def test_a_calibrated_run_is_checked(copied_run, capsys):
    few = ["--anchors", "40", "--unrelated", "64", "--clusters", "4", "--distances", "0.001", "3"]
    assert _calibrate.main([str(copied_run), *few]) == 0
    assert check_calibration.main([str(copied_run)]) == 0
    found = json.loads((copied_run / "calibration" / "classes.json").read_text())
    assert found["accuracy"] > 0.9 and found["anchors"] == 40
    assert list(found["ways"]) == ["gaussian", "untrained-navigator", "navigator"]
    for way in found["ways"].values():
        at = {point["distance"]: point["changed"] for point in way["at_distances"]}
        assert at[0.001] <= 0.05 < at[3.0] < 1
    assert "gaussian: at" in capsys.readouterr().out


@pytest.fixture
def points():
    """Accuracy is a parabola in the log of the distance over the proposal, which differs between ways."""
    proposed = {"near": 0.5, "middle": 1.5, "far": 4.0}
    found = []
    for way, proposal in proposed.items():
        for distance in (0.7, 1.4, 2.1, 3.0):
            x = np.log(distance / proposal)
            found.append(Point(way, distance, distance / proposal, 0.9 - 0.01 * (x - 0.5) ** 2 - 0.02 * x))
    return found


def test_a_predictor_is_credited_with_what_it_tells(points):
    by_distance, relative = PREDICTORS
    assert r_squared(points, relative) == pytest.approx(1) and r_squared(points, by_distance) < 0.6
    assert left_out_error(points, relative) == pytest.approx(0, abs=1e-6) and left_out_error(points, by_distance) > 0.5
    assert rank_correlation(points, relative) < rank_correlation(points, by_distance) < 0


def test_a_way_stands_at_the_distance_nearest_to_its_proposal(points):
    chosen = [next(point.value for point in points if (point.way, point.distance) == at)
              for at in (("near", 0.7), ("middle", 1.4), ("far", 3.0))]  # fmt: skip
    assert at_proposals(points) == pytest.approx(np.mean(chosen))


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_committed_calibrations_are_whole(data):
    calibration = make_calibration_tables.Calibration(data)
    assert len(calibration.seeds) >= 3
    for of_way in calibration.rows().values():
        assert of_way.keys() == calibration.seeds.keys()
        for way in of_way.values():
            low, high = way["interval"]
            assert low <= way["proposal"] <= high
            assert way["class_changes"]["at_proposal"]["distance"] == way["proposal"]
