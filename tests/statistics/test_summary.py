"""What is made of a study's numbers: pairing by seed, the family of comparisons, and what is missing."""

import numpy as np
import pytest

from copgen_fast.errors import UsageError
from copgen_fast.runtime import artifacts
from copgen_fast.statistics.paired import detectable_difference, holm, sign_flip_p
from copgen_fast.statistics.summary import summarize
from copgen_fast.studies._tables import results_table
from tests.helpers.study_results import GAIN, IMAGES, study_results, write_files


def test_numbers_and_differences_are_those_of_the_runs():
    results = study_results()
    summary = summarize(results)
    arm = summary.arm("gaussian d=1.4")
    values = {run["seed"]: run["numbers"]["linear_top1"] for run in results["runs"] if run["arm"] == arm.name}
    found = arm.numbers["linear_top1"]
    assert found.values == values and found.mean == pytest.approx(np.mean(list(values.values())))
    assert found.sd == pytest.approx(np.std(list(values.values()), ddof=1))
    assert arm.differences["linear_top1"].mean == pytest.approx(0.04, abs=0.006)
    assert not arm.differences["linear_top1"].holds_zero
    assert arm.differences["knn_top1"].interval and arm.differences["knn_top1"].p is None, "the metric alone is tested"
    assert [row.name for row in summary.arms] == [*GAIN, "random", "pixels"]
    assert not summary.arm("identity").differences and summary.arm("identity").numbers["displacement_norm"].mean == 0


def test_the_arms_are_one_family_and_references_none_of_it():
    summary = summarize(study_results())
    tested = {arm.name: arm.differences["linear_top1"] for arm in summary.arms if arm.name in list(GAIN)[1:]}
    p_values = {name: sign_flip_p(list(row.values.values())) for name, row in tested.items()}
    assert {name: row.p for name, row in tested.items()} == p_values and summary.comparisons == 3
    assert {name: row.p_holm for name, row in tested.items()} == holm(p_values)
    assert {name: row.t_p_holm for name, row in tested.items()} == holm({name: row.t_p for name, row in tested.items()})
    reference = summary.arm("random")
    assert reference.reference and reference.differences["linear_top1"].p is None
    sd = np.sqrt(np.mean([row.sd**2 for row in tested.values()]))
    assert summary.detectable == pytest.approx(detectable_difference(sd, 5)) and summary.smallest_p == 0.0625


def test_common_seeds_alone_are_paired():
    states = {("identity", 1): "failed", ("gaussian d=1.4", 2): "waiting", ("gaussian d=1.4", 3): "failed"}
    arm = (summary := summarize(study_results(states=states))).arm("gaussian d=1.4")
    assert set(arm.numbers["linear_top1"].values) == {0, 1, 4}
    assert set(arm.differences["linear_top1"].values) == {0, 4}
    assert arm.failed == {3: "NaN in the loss"} and arm.waiting == (2,)
    assert set(summary.arm("navigator d=1.4").differences["linear_top1"].values) == {0, 2, 3, 4}


def test_one_seed_and_no_run_yet():
    summary = summarize(study_results(seeds=(0,)))
    assert summary.detectable is None and summary.comparisons == 0
    assert summary.arm("navigator d=1.4").differences["linear_top1"].interval is None
    nothing = summarize(study_results(states={(name, seed): "waiting" for name in GAIN for seed in range(5)}))
    assert not nothing.arm("gaussian d=1.4").numbers and not nothing.arm("random").differences


def test_a_baseline_that_is_no_arm():
    with pytest.raises(UsageError, match="--baseline steering: it is none of the arms identity, gaussian"):
        summarize(study_results(baseline="steering"))


def test_the_first_arm_is_the_baseline_where_none_is_named():
    assert summarize(study_results(baseline="")).baseline == "identity"


def test_images_are_bootstrapped_where_every_pair_says_which_were_right(tmp_path):
    results = write_files(study_results(), tmp_path)
    summary = summarize(results, tmp_path, resamples=500)
    arm = summary.arm("gaussian d=2.1")
    known = arm.images
    assert known.count == IMAGES and arm.differences["linear_top1"].mean in known.images
    assert summary.arm("random").images and not summary.arm("identity").images
    assert summarize(results, tmp_path, resamples=500) == summary
    assert not summarize(results).arm("gaussian d=2.1").images

    (tmp_path / "runs/gaussian_d=2.1/seed-3/probe/gaussian.images.safetensors").unlink()  # a run of an older version
    other = tmp_path / "runs/navigator_d=1.4/seed-0/probe/navigator.images.safetensors"
    right = artifacts.read_tensors(other)
    artifacts.write_tensors(other, {name: row[:-1] for name, row in right.items()})  # of other images
    again = summarize(results, tmp_path, resamples=500)
    assert not again.arm("gaussian d=2.1").images and not again.arm("navigator d=1.4").images
    assert again.arm("gaussian d=1.4").images == summary.arm("gaussian d=1.4").images


def test_arms_are_compared_within_the_values_of_a_setting():
    results = study_results(within=["pretrain.augmentation"])
    for arm, policy in zip(results["study"]["arms"], ("none", "none", "simclr", "simclr"), strict=True):
        arm["settings"] |= {"pretrain.augmentation": policy}
    results["study"]["arms"][3]["settings"] = {"pairs.positives": "identity", "pretrain.augmentation": "simclr"}
    for run in results["references"]:
        run["of"] = ["navigator d=1.4"] if run["arm"] == "pixels" else ["identity", "navigator d=1.4"]
    summary = summarize(results)
    assert {arm.name: arm.baseline for arm in summary.arms} == {
        "identity": "",
        "gaussian d=1.4": "identity",
        "gaussian d=2.1": "navigator d=1.4",  # the name that the test gave to identity with simclr
        "navigator d=1.4": "",
        "random": "identity",
        "pixels": "navigator d=1.4",
    }
    assert summary.baselines == ("identity", "navigator d=1.4") and summary.comparisons == 2
    values = [summary.arm(name).numbers["linear_top1"].mean for name in ("gaussian d=2.1", "navigator d=1.4")]
    assert summary.arm("gaussian d=2.1").differences["linear_top1"].mean == pytest.approx(values[0] - values[1])
    table = results_table(summary)
    assert table.heading[1] == "its baseline" and [row[1] for row in table.rows][2:4] == ["navigator d=1.4", ""]
