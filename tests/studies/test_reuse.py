"""Finished runs whose parts a study takes: only of the same settings and seed, and said where there are none."""

import pytest
import torch

from copgen_fast import train
from copgen_fast.errors import UsageError
from copgen_fast.record import identity
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.studies import Study, _grid, _plan, _reuse


@pytest.fixture
def folder(tmp_path):
    """What `_reuse` reads of a run of the quickstart, in which two of five encoders are finished."""
    config, cpu = train.parse(["quickstart", "--device", "cpu", "--out", str(tmp_path / "run")]), torch.device("cpu")
    run = Run(train.resolved(config, tmp_path / "run", cpu), tmp_path / "run", cpu)
    artifacts.write_json(run.folder / "config.json", identity(run.config))
    for way in ("gaussian", "steering"):
        artifacts.write_tensors(run.encoder_file(way), {}, **run.encoder_of(way))
    (run.folder / "steering").mkdir()
    return run.folder


def planned(tmp_path, **settings):
    study = _grid.expand(Study("quickstart", (), {"device": "cpu"} | settings), {})
    return _plan.plan(study, (0, 1), tmp_path / "study")


def test_finished_encoders_of_the_same_settings_and_seed_are_taken(folder, tmp_path):
    before = planned(tmp_path, **{"probe.evals": ("linear", "pairs")})  # the evaluation may be another
    after = _reuse.reuse(before, [folder])
    taken = [(run.arm, run.seed) for run in after if any(need.folder == folder for need in run.unit.needs)]
    assert taken == [("gaussian", 0), ("steering", 0)]
    assert [run for run in after if (run.arm, run.seed) not in taken] == [
        run for run in before if (run.arm, run.seed) not in taken
    ]
    links = {run.arm: [where for where, _ in run.unit.links] for run in after if run.seed == 0}
    assert links["gaussian"] == ["steering", "pretrain/gaussian"]
    spared = {unit.folder.name for unit in _plan.units(before)} - {unit.folder.name for unit in _plan.units(after)}
    # Those of gaussian serve the other seed.
    assert {name.rpartition("-")[0] for name in spared} == {"steering", "pairs-steering"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrain.lr": "1"}, r"holds none of the study's runs.*pretrain.lr \(0..? there, 1.0 here\)"),
        ({"pairs.positives": "identity"}, "encoder.safetensors is missing"),
    ],
)
def test_a_run_of_other_settings_is_refused(folder, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        _reuse.reuse(planned(tmp_path, **settings), [folder])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--reuse .*nowhere: there is no run"):
        _reuse.reuse([], [tmp_path / "nowhere"])
