"""Numbers of a study's runs that are computed from their files."""

import dataclasses
import json

import pytest
import torch

from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.studies._results import numbers_of


def trained(folder, rows):
    """A run whose pretraining of 4 epochs logged these rows, one a step."""
    preset = PRESETS["quickstart"]
    config = dataclasses.replace(preset, pretrain=dataclasses.replace(preset.pretrain, epochs=4))
    run = Run(config, folder, torch.device("cpu"))
    artifacts.write_record(run.probe_file("identity"), {"linear_top1": 0.5, "seconds": 1.0})
    artifacts.write_record(run.pretrain_folder("identity") / "summary.json", {"loss": 3.0, "seconds": 2.0})
    lines = [json.dumps({"step": step} | row) + "\n" for step, row in enumerate(rows)]
    (run.pretrain_folder("identity") / "metrics.jsonl").write_text("".join(lines))
    return run


def test_the_bound_on_mutual_information_is_the_last_epochs_mean(tmp_path):
    rows = [{"mi_lower_bound": bound} for bound in (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 2.0, 3.0)]
    found = numbers_of(trained(tmp_path, rows), "identity")
    assert found["mi_lower_bound"] == pytest.approx(2.5)
    assert found["seconds"] == 2.0, "of pretraining"


@pytest.mark.parametrize("rows", [[], [{"loss": 3.0}]], ids=["no log", "a method without it"])
def test_without_a_logged_bound_there_is_none(tmp_path, rows):
    assert "mi_lower_bound" not in numbers_of(trained(tmp_path, rows), "identity")
