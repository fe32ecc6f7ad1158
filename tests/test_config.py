import dataclasses
import json

import pytest

from copgen_fast import registry
from copgen_fast.config import STAGES, MethodConfig, NavigatorConfig, PairsConfig, PretrainConfig, RunConfig, faults
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.record import RENAMED, differences, expect_current, from_identity, identity


def test_names_in_the_configuration_are_those_on_disk():
    assert set(STAGES) == set(registry.names("stages")) - {"run"}
    for preset in PRESETS.values():
        assert set(preset.pairs.positives) <= set(registry.names("positives"))
        assert set(preset.probe.evals) <= set(registry.names("evals"))
        assert preset.generator.name in registry.names("generators")


def test_the_defaults_are_the_papers():
    config = RunConfig()
    assert (config.navigator.samples, config.navigator.batch) == (200_000, 176)
    assert (config.navigator.lr, config.navigator.estimator_lr) == (1e-5, 3e-5)
    assert (config.navigator.temperature, config.navigator.base_temperature) == (0.1, 0.07)
    assert (config.pretrain.epochs, config.pretrain.batch, config.pretrain.lr) == (100, 224, 0.03)
    assert (config.pretrain.momentum, config.pretrain.weight_decay) == (0.9, 1e-4)


def test_identity_is_json_and_leaves_out_where_and_how_much_is_run():
    here = RunConfig()
    elsewhere = dataclasses.replace(here, out="/elsewhere", device="cpu", stages=("probe",))
    assert identity(here) == identity(elsewhere) == json.loads(json.dumps(identity(here)))


def test_differences_name_the_fields_with_both_values():
    one = identity(RunConfig())
    other = identity(RunConfig(seed=3, navigator=NavigatorConfig(lr=0.5)))
    assert differences(one, other) == ["navigator.lr (1e-05 there, 0.5 here)", "seed (0 there, 3 here)"]


def test_a_configuration_comes_back_from_its_record():
    for preset in PRESETS.values():
        record = json.loads(json.dumps(identity(preset)))
        assert identity(from_identity(record)) == identity(preset)


def test_numbers_out_of_range_are_named():
    assert faults(RunConfig()) == []
    assert faults(RunConfig(save_every=0)) == ["save_every: expected 1 or more, got 0"]
    assert faults(RunConfig(seed=-1))[0].startswith("seed: expected 0 to 9")
    assert faults(RunConfig(navigator=NavigatorConfig(lr=float("nan")))) == [
        "navigator.lr: expected 1e-12 to 1000, got nan"
    ]
    assert "give --navigator.delta too" in faults(RunConfig(navigator=NavigatorConfig(project=True)))[0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"pretrain": {"batch": 10, "accumulate": 4}}, "pretrain.accumulate: expected a divisor of pretrain.batch 10"),
        ({"navigator": {"batch": 1}}, "navigator.batch: a pair alone has no negatives"),
        ({"pretrain": {"batch": 1, "data": "real"}}, "pretrain.batch: a pair alone has no negatives"),
        (
            {"pretrain": {"batch": 4, "accumulate": 4}},
            "pretrain.batch: pretrain.accumulate 4 leaves batch norm the statistics of one pair: take 8 or more",
        ),
        ({"pretrain": {"accumulate": 0}}, "pretrain.accumulate: expected 1 or more"),
        ({"pretrain": {"checkpoint": True}, "compile": True}, "compile: does not go with pretrain.checkpoint"),
        ({"pretrain": {"batch": 200}, "pairs": {"count": 199}}, "pretrain.batch: expected at most pairs.count 199"),
        (
            {"pretrain": {"data": "real", "loader": "dali"}},
            "pretrain.loader: dali reads shards, and images of data set digits are in none",
        ),
        (
            {"pretrain": {"data": "online", "loader": "dali"}},
            "pretrain.loader: dali reads shards, and online pairs are in none",
        ),
        ({"pretrain": {"data": "real", "shuffle_shards": 2}}, "pretrain.shuffle_shards: real images are in no shards"),
        ({"pairs": {"parts": 2}}, "pairs.parts: every part would run the other stages too: give --stages pairs"),
        ({"pairs": {"positives": ()}}, "pairs.positives: expected at least one"),
        ({"probe": {"evals": ()}}, "probe.evals: expected at least one"),
    ],
)
def test_what_does_not_go_together_is_said(changes, fault):
    config = RunConfig()
    for name, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    assert any(line.startswith(fault) for line in faults(config))


def test_a_rank_with_a_pair_alone_has_no_statistics_of_its_own():
    config = RunConfig(navigator=NavigatorConfig(batch=4), bn="per-rank")
    assert faults(config, processes=2) == []
    assert faults(config, processes=4) == [
        "navigator.batch: --bn per-rank on 4 processes leaves batch norm the statistics of one pair: take 8 or more"
    ]
    assert faults(dataclasses.replace(config, bn="sync"), processes=4) == []


def test_what_a_stage_can_do_is_no_fault():
    parts = dataclasses.replace(RunConfig().pairs, parts=2, count=100)
    assert faults(RunConfig(stages=("pairs",), pairs=parts)) == []
    small = dataclasses.replace(RunConfig().pairs, count=100)
    assert faults(RunConfig(pairs=small, pretrain=PretrainConfig(data="real"))) == []


def test_sparing_memory_is_no_other_run():
    sparing = dataclasses.replace(RunConfig(), pretrain=PretrainConfig(checkpoint=True))
    assert identity(sparing) == identity(RunConfig())
    assert identity(dataclasses.replace(RunConfig(), pretrain=PretrainConfig(accumulate=2))) != identity(RunConfig())


def test_every_option_of_every_part_is_recorded_by_its_value():
    config = RunConfig(
        method=MethodConfig("supcon", ("temperature=.2",)),
        pairs=PairsConfig(positives=("identity", "gaussian"), options=("gaussian.std=.50",)),
    )
    record = identity(config)
    assert record["method"] == "supcon" and record["method.options.temperature"] == 0.2
    assert record["method.options.base_temperature"] == 0.07, "defaults too"
    assert record["positive.options.gaussian.std"] == 0.5 and "pairs.options" not in record
    same = dataclasses.replace(config, pairs=dataclasses.replace(config.pairs, options=("gaussian.std=0.5",)))
    assert identity(same) == record
    assert identity(from_identity(json.loads(json.dumps(record)))) == record


def test_a_part_given_as_a_file_is_another_one_when_it_changes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build(setting): ...\n")
    config = RunConfig(pairs=PairsConfig(positives=(str(path),)))
    before = identity(config)
    path.write_text("def build(setting): pass\n")
    assert differences(before, identity(config))[0].startswith(f"{path}.sha256")


def test_records_of_the_first_version_are_refused_by_what_replaced_their_options(tmp_path):
    expect_current(identity(RunConfig()), tmp_path)
    for name in RENAMED:
        with pytest.raises(UsageError, match=f"a run of copgen_fast 0.1, which had {name}"):
            expect_current({name: 1}, tmp_path)


def test_names_that_mean_something_else_are_no_sources():
    assert (
        "pairs.positives: 'real' means something else here"
        in faults(RunConfig(pairs=PairsConfig(positives=("./real.py",))))[0]
    )
