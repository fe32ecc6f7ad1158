"""The named studies: their arms are the runs that they are meant to be, and the paper's numbers stand beside the right
ones.
"""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from copgen_fast import registry, study, train
from copgen_fast.config import faults
from copgen_fast.errors import UsageError
from copgen_fast.record import identity
from copgen_fast.statistics.summary import summarize
from copgen_fast.studies import _plan, _settings

FINDINGS = Path(__file__).parents[2] / "docs" / "findings"
SIZES = {"table1": 12, "table2": 5, "table3": 9, "table4": 4, "table5": 3, "linear-tz": 2}
"""Arms of the paper's tables: its rows, and an untrained navigator where ways of making positives are compared."""
TABLES = [(name, f"scale={scale}") for name in SIZES for scale in ("paper", "small")]
POSITIVES = [("positives-digits", "distances=2"), ("positives-cifar10", "distances=2")]


def built(name, *options):
    """A study as its command has it."""
    return study.study_of(*study.parse([name, *(["--study.options", *options] if options else [])]))


@functools.cache
def opened(name, *options):
    """The same, and the configuration of each arm's run."""
    found = built(name, *options)
    return found, {arm.name: train.parse(run_words(found, arm)) for arm in found.arms}


def run_words(found, arm):
    """What the command of an arm's run says."""
    return _settings.words(found.preset, _settings.applicable(found.preset, {**found.settings, **arm.settings}))


@pytest.mark.parametrize("key", [*TABLES, *POSITIVES])
def test_every_run_is_a_valid_one(key):
    found, configs = opened(*key)
    for config in configs.values():
        assert not faults(config) and identity(config)
        assert len(config.pairs.positives) == 1 or config.pretrain.data == "real"
    assert len(configs) == SIZES.get(key[0], len(configs)) and found.baseline in configs
    known = {evaluation.replace("-", "_") for evaluation in configs[found.baseline].probe.evals}
    assert any(found.metric.startswith(f"{evaluation}_") for evaluation in known)
    assert len({identity(config).__repr__() for config in configs.values()}) == len(configs), "no two arms are one run"


def test_these_are_all():
    on_digits = {"navigator-digits", "loss-digits", "mends-digits"}
    assert set(registry.names("studies")) == {*SIZES, *(name for name, _ in POSITIVES), *on_digits}


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_numbers_stand_beside_its_scale_alone(name):
    found, configs = opened(name)
    assert found.published and set(found.published) <= set(configs) and "Li et al. 2022" in found.source
    missing = set(configs) - set(found.published)
    assert all("untrained-navigator" in arm for arm in missing)
    for numbers in found.published.values():
        assert set(numbers) <= {found.metric, *found.columns}
        assert all(0.2 < value < 0.9 for value in numbers.values())
    small, _ = opened(name, "scale=small")
    assert not small.published and not small.source and "small scale" in small.title


@pytest.mark.parametrize(
    ("name", "arm", "number", "per_cent"),
    [
        ("table1", "identity Neg FT", "linear_augmented_top1_best", 43.26),
        ("table1", "real NNCLR", "linear_augmented_top5_best", 76.80),
        ("table1", "identity InfoMin", "detection_ap50", 75.68),
        ("table1", "steering", "detection_ap75", 56.43),
        ("table1", "navigator", "detection_ap", 53.09),
        ("table2", "navigator", "transfer_oxfordiiitpet_top1", 73.56),
        ("table2", "steering", "transfer_caltech101_background_top1", 84.65),
        ("table2", "real NNCLR", "semi_supervised_5pct_top5", 76.28),
        ("table3", "steering T_x=none", "linear_augmented_top1_best", 28.68),
        ("table4", "no-crop", "linear_augmented_top1_best", 43.84),
        ("table5", "400K", "linear_augmented_top1_best", 64.12),
        ("linear-tz", "linear", "linear_augmented_top1_best", 61.18),
    ],
)
def test_numbers_of_the_paper(name, arm, number, per_cent):
    assert opened(name)[0].published[arm][number] == pytest.approx(per_cent / 100)


def test_table_1_has_methods_by_positives_and_real_images():
    _, configs = opened("table1")
    for arm, config in configs.items():
        real = arm.startswith("real")
        options = registry.options_by_name("evals", config.probe.evals, config.probe.options)
        assert options["linear-augmented"].lr == (0.3 if real else 2.0) and options["linear-augmented"].epochs == 60
        assert options["detection"].schedule == "paper"
        assert (config.pretrain.data == "real") == real
        assert config.method.name == {"FT": "negft", "NNCLR": "nnclr"}.get(arm.split()[-1], "simclr")
        assert config.pretrain.augmentation == ("infomin" if arm.endswith("InfoMin") else "simclr")
        if not real:
            assert (config.pairs.positives, config.pairs.count) == ((arm.split()[0],), 1_300_000)
    assert [configs[arm].navigator.delta for arm in configs] == [None] * 12, "stopped by samples, as in the paper"


def test_the_ablations_change_what_they_ablate_alone():
    _, table3 = opened("table3")
    assert {table3[arm].pairs.count for arm in table3} == {130_000}
    assert all(config.navigator.augmentation == "simclr" for config in table3.values())
    without = [arm for arm, config in table3.items() if config.pretrain.augmentation == "none"]
    assert without == [f"{way} T_x=none" for way in ("gaussian", "steering", "untrained-navigator", "navigator")]
    _, table4 = opened("table4")
    assert all(config.navigator.augmentation == config.pretrain.augmentation == arm for arm, config in table4.items())
    _, table5 = opened("table5")
    assert [config.navigator.samples for config in table5.values()] == [200_000, 400_000, 600_000]
    kinds = {arm: config.navigator.kind for arm, config in opened("linear-tz")[1].items()}
    assert kinds == {"nonlinear": "nonlinear", "linear": "linear"}


@pytest.mark.parametrize(
    ("key", "augmentations", "count"), [(POSITIVES[0], "digits none", 34), (POSITIVES[1], "simclr none", 26)]
)
def test_positives_are_compared_at_equal_distance(key, augmentations, count):
    found, configs = opened(*key)
    assert len(configs) == 10 and found.baseline == "identity T_x=none"
    assert len(built(key[0]).arms) == count
    assert {config.pretrain.augmentation for config in configs.values()} == set(augmentations.split())
    for arm, config in configs.items():
        (way,) = config.pairs.positives
        options = registry.options_by_name("positives", config.pairs.positives, config.pairs.options)[way]
        if way != "identity":
            assert f"{way} d={options.distance:g} T_x={config.pretrain.augmentation}" == arm
        assert config.navigator.project == (way == "navigator")
        if way == "navigator":
            assert config.navigator.delta == options.distance == 2


def test_options_of_the_positives_studies():
    found = built("positives-digits", "distances=1,2.5", "augmentations=digits")
    assert len(found.arms) == 9 and found.baseline == "identity T_x=digits"
    assert "navigator d=2.5 T_x=digits" in {arm.name for arm in found.arms}
    with pytest.raises(UsageError, match="distances: expected"):
        built("positives-digits", "distances=0")


def test_table_3_compares_within_T_x():
    found = built("table3")
    assert (found.baseline, found.within) == ("gaussian", ("pretrain.augmentation",))


def test_pairs_serve_both_policies_of_pretraining():
    found = built("positives-digits", "distances=2")
    needs = {unit.folder.name for run in _plan.plan(found, (0,), Path("out")) for unit in run.unit.needs}
    assert len(found.arms) == 10 and sum(name.startswith("pairs-") for name in needs) == 5


def test_navigators_are_compared_at_one_distance_and_changed_one_by_one():
    found, configs = opened("navigator-digits", "distance=2")
    assert found.baseline == "untrained" and len(configs) == len(found.arms) == 13
    base = configs["navigator"]
    assert (base.navigator.project, base.navigator.delta, base.pretrain.augmentation) == (True, 2.0, "none")
    for arm, config in configs.items():
        distances = [word for word in config.pairs.options if "distance" in word and not word.endswith("None")]
        assert len(distances) == (arm not in ("identity", "auto")), arm
    one = {"near-zero start": {"init": "near-zero"}, "linear": {"kind": "linear"}, "lr 2e-5": {"lr": 2e-5}}
    for arm, change in one.items():
        assert configs[arm].navigator == dataclasses.replace(base.navigator, **change)
    assert "navigator.centered=True" in configs["centered"].pairs.options


def test_losses_are_compared_over_as_many_images_and_share_navigators():
    found, configs = opened("loss-digits", "temperatures=0.2,1")
    assert found.baseline == "gaussian" and len(configs) == len(found.arms) == 12
    for config in configs.values():
        images, steps = 1 + config.pairs.positives_per_anchor, config.pairs.count // config.pretrain.batch
        assert (images * config.pairs.count, steps) == (8192, 32)
    assert configs["navigator trained at temperature=1"].navigator.temperature == 1
    needs = {unit.folder.name for run in _plan.plan(found, (0,), Path("out")) for unit in run.unit.needs}
    assert sum(name.startswith("navigator-") for name in needs) == 3


def test_mends_change_one_thing_each_at_one_distance():
    found, configs = opened("mends-digits", "distance=2")
    assert found.baseline == "untrained" and len(configs) == len(found.arms) == 9
    base = configs["navigator"].navigator
    assert (base.project, base.delta, base.groups) == (True, 2.0, ())
    assert configs["navigator rescaled"].navigator == dataclasses.replace(base, project=False, delta=None)
    for arm, config in configs.items():
        assert [word for word in config.pairs.options if word.endswith("distance=2")], arm
        images, steps = 1 + config.pairs.positives_per_anchor, config.pairs.count // config.pretrain.batch
        assert (images * config.pairs.count, steps) == (8192, 32)
    for half, group in (("first half", 0), ("second half", 1)):
        config = configs[f"navigator {half}"]
        assert config.navigator == dataclasses.replace(base, groups=(group,))
        assert config.generator.options == ("groups=32,32",)


def test_losses_are_compared_at_equal_temperature():
    content = json.loads((FINDINGS / "loss-digits.json").read_text())
    assert content["study"]["within"] == list(built("loss-digits").within)
    baselines = {arm.name: arm.baseline for arm in summarize(content).arms if not arm.reference}
    assert baselines["navigator pretrain temperature=0.5"] == "gaussian pretrain temperature=0.5"
    assert baselines["gaussian pretrain temperature=0.5"] == baselines["gaussian"] == ""
    assert baselines["navigator trained at temperature=0.5"] == baselines["gaussian 3 positives"] == "gaussian"


@pytest.mark.parametrize("name", ["positives-digits", "navigator-digits", "loss-digits", "mends-digits"])
def test_results_on_digits_are_of_the_studies_as_they_are(name):
    """A named study keeps the settings of its committed results, also where the quickstart's change."""
    recorded, found = json.loads((FINDINGS / f"{name}.json").read_text())["study"], built(name)
    assert recorded["settings"] == json.loads(json.dumps(found.settings))
    assert recorded["within"] == list(found.within)
    assert {arm["name"]: arm["settings"] for arm in recorded["arms"]} == {arm.name: arm.settings for arm in found.arms}
