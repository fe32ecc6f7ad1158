"""Which settings decide what runs share, and that commands are as planned."""

from pathlib import Path

import pytest

from copgen_fast import train
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.studies import Arm, Study, _grid, _plan

FOLDER = Path("study")


def planned(settings, seeds=(0,), preset="quickstart", **fields):
    study = _grid.expand(Study(preset, (Arm("one", settings),), **fields), {})
    return study, _plan.plan(study, seeds, FOLDER)


def shared(way, settings=None, seed=0):
    """Folders of what a run shares, by stage."""
    settings = settings or {}
    positives = {} if settings.get("pretrain.data") == "real" else {"pairs.positives": way}
    run = planned(positives | settings, (seed,))[1][0]
    units = _plan.units([run])
    return {unit.folder.name.rpartition("-")[0]: unit.folder.name for unit in units if unit is not run.unit}


def changed(way, settings, seed=0):
    """What of a run is no longer shared with the plain one."""
    before, after = shared(way), shared(way, settings, seed)
    return {stage for stage in before | after if before.get(stage) != after.get(stage)}


@pytest.mark.parametrize(
    ("way", "settings", "seed", "expected"),
    [
        ("identity", {"pretrain.lr": "1", "method": "simsiam", "navigator.lr": "1"}, 0, set()),
        ("identity", {}, 1, {"baselines"}),
        ("gaussian", {}, 1, {"baselines"}),
        ("gaussian", {"positive.options.gaussian.std": "1"}, 0, {"pairs-gaussian"}),
        ("gaussian", {"pairs.count": "500"}, 0, {"pairs-gaussian"}),
        ("gaussian", {"generator.name": "resnet-gan"}, 0, {"pairs-gaussian"}),
        ("untrained-navigator", {"navigator.lr": "1", "navigator.delta": "3"}, 0, set()),
        ("untrained-navigator", {"navigator.init": "near-zero"}, 0, {"pairs-untrained-navigator"}),
        ("untrained-navigator", {}, 1, {"pairs-untrained-navigator", "baselines"}),
        ("navigator", {"pretrain.augmentation": "digits"}, 0, {"baselines"}),  # of another normalisation
        ("navigator", {"navigator.lr": "1"}, 0, {"navigator", "pairs-navigator"}),
        ("navigator", {"log_every": "7"}, 0, {"navigator", "pairs-navigator"}),  # when delta is looked at
        ("navigator", {"positive.options.navigator.distance": "1"}, 0, {"pairs-navigator"}),
        ("navigator", {"pretrain.epochs": "1", "steering.lr": "1"}, 0, set()),
        ("steering", {"steering.lr": "1"}, 0, {"steering", "pairs-steering"}),
        ("steering", {"navigator.lr": "1", "navigator.delta": "auto"}, 0, set()),
        ("identity", {"probe.evals": ("knn",)}, 0, {"baselines"}),
        ("identity", {"probe.evals": ("linear", "lowshot", "knn", "collapse", "pairs")}, 0, set()),
        ("identity", {"pretrain.encoder.width": "8"}, 0, {"baselines"}),
        ("identity", {"probe.baselines": ()}, 0, {"baselines"}),
        ("identity", {"pretrain.data": "online"}, 0, {"pairs-identity"}),
        ("identity", {"pretrain.data": "real"}, 0, {"pairs-identity"}),
    ],
)
def test_settings_change_only_what_they_decide(way, settings, seed, expected):
    assert changed(way, settings, seed) == expected


def test_a_delta_found_by_an_encoder_depends_on_its_pretraining():
    auto = {"navigator.delta": "auto"}
    first, second = shared("navigator", auto), shared("navigator", auto | {"pretrain.epochs": "9"})
    assert first["navigator"] != second["navigator"] and first["baselines"] == second["baselines"]


def test_a_way_of_the_users_own_depends_on_all_that_it_is_given(tmp_path):
    path = tmp_path / "my_way.py"
    path.write_text("def build(setting):\n    return lambda z, seeds: z + 1\n")
    before = shared(str(path))
    assert set(before) == {"navigator", "pairs-my_way", "baselines"}
    assert before["pairs-my_way"] != shared(str(path), {"steering.lr": "1"})["pairs-my_way"]
    path.write_text("def build(setting):\n    return lambda z, seeds: z + 2\n")
    assert before["pairs-my_way"] != shared(str(path))["pairs-my_way"]


@pytest.mark.parametrize("way", ["untrained-navigator", "navigator"])
def test_configurations_are_what_the_commands_say(way):
    _, (run, other) = planned({"pairs.positives": way, "method": "moco"}, (0, 3))
    for unit in (run.unit, other.unit, run.baselines, *run.unit.needs, *other.unit.needs):
        assert train.parse(list(unit.words)) == unit.config
    assert run.source == way and other.unit.config.seed == 3
    assert other.unit.folder == FOLDER / "runs" / "one" / "seed-3"


def test_runs_come_seed_by_seed_after_what_they_need():
    study = _grid.expand(Study("quickstart", ()), {})
    runs = _plan.plan(study, (0, 1), FOLDER)
    ways = PRESETS["quickstart"].pairs.positives
    assert [(run.arm, run.seed) for run in runs] == [(way, seed) for seed in (0, 1) for way in ways]
    units = _plan.units(runs)
    for number, unit in enumerate(units):
        assert all(need in units[:number] for need in unit.needs)
    assert len({unit.folder for unit in units}) == len(units)


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"pretrain.lr": "x"}, {}, "^arm one: .*--pretrain.lr"),
        ({"pretrain.lr": "-1"}, {}, "^arm one: --pretrain.lr: expected"),
        ({"pairs.positives": "gausian"}, {}, "^arm one: unknown name 'gausian'"),
        ({"pretrain.augmentation": "smclr"}, {}, "^arm one: unknown augmentation"),
        ({"generator.name": "torchscript"}, {}, "^arm one: .*weights"),
        ({"generator.name": "cifar10-dcgan", "generator.weights": "/no/such.pth"}, {}, "^arm one: .*such.pth"),
        ({"data.name": "cifar10", "data.root": "/no/such"}, {}, "^arm one: .*/no/such"),
        ({"probe.evals": ("knn",)}, {}, "metric linear_top1: arm one has evaluations knn"),
    ],
)
def test_what_runs_would_lack_is_told_before(settings, fields, message):
    with pytest.raises(UsageError, match=message) as error:
        _plan.validate(*planned({"pairs.positives": "identity"} | settings, **fields))
    assert "\n" not in str(error.value)


def test_real_images_are_opened_once_for_all_arms(monkeypatch):
    opened = []
    monkeypatch.setattr("copgen_fast.evals.expect_data", opened.append)
    study = _grid.expand(Study("quickstart", ()), _grid.vary(["pretrain.lr=1,2"]))
    _plan.validate(study, _plan.plan(study, (0, 1), FOLDER))
    assert len(opened) == 1
