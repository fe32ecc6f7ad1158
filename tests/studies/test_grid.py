"""Arms and seeds of a command line, and the words of runs."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copgen_fast import registry, train
from copgen_fast.config import RunConfig, flat
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.record import identity
from copgen_fast.studies import Arm, Study, _grid, _settings


def expanded(*vary, preset="quickstart", arms=(), settings=None, **fields):
    return _grid.expand(Study(preset, arms, settings or {}, **fields), _grid.vary(vary))


def config_of(study, arm):
    settings = _settings.applicable(study.preset, {**study.settings, **arm.settings})
    return train.parse(_settings.words(study.preset, settings))


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=20))
def test_seeds_are_read_as_they_are_written(wanted):
    assert set(_grid.seeds(",".join(map(str, wanted)))) == wanted
    first = min(wanted)
    assert _grid.seeds(f"{first}..{first + len(wanted) - 1}") == tuple(range(first, first + len(wanted)))
    assert _grid.seeds(f"{first},20000..20002") == (first, 20000, 20001, 20002)


@pytest.mark.parametrize("text", ["", "x", "1,", "3..1", "0..99999999", "1,1", "0..3,2", "-1", "1.5", "0...3", "0.."])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="--seeds"):
        _grid.seeds(text)


def test_arms_are_the_product_of_what_varies():
    study = expanded("pairs.positives=identity,gaussian", "pretrain.augmentation=digits,none", "pretrain.lr=.1,.2")
    assert [arm.name for arm in study.arms][:3] == [
        "identity digits lr=.1",
        "identity digits lr=.2",
        "identity none lr=.1",
    ]
    assert len(study.arms) == 8 and study.baseline == "identity digits lr=.1"
    config = config_of(study, study.arms[-1])
    assert config.pairs.positives == ("gaussian",)
    assert (config.pretrain.augmentation, config.pretrain.lr) == ("none", 0.2)


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ([], ["identity", "gaussian", "navigator", "steering"]),  # the preset's ways, an arm each
        (["pairs.positives=gaussian", "pretrain.data=pairs,real"], ["gaussian pairs", "real"]),
        (
            ["pairs.positives=identity,gaussian", "positive.options.gaussian.std=0.1,0.2"],
            ["identity", "gaussian std=0.1", "gaussian std=0.2"],
        ),
        (
            ["pairs.positives=identity,steering", "positive.options.*.distance=1,2"],
            ["identity", "steering distance=1", "steering distance=2"],
        ),
        (
            ["pairs.positives=identity", "navigator.augmentation=none,digits", "pretrain.augmentation=none"],
            [
                "identity navigator.augmentation=none pretrain.augmentation=none",
                "identity navigator.augmentation=digits pretrain.augmentation=none",
            ],
        ),
        (["pairs.positives=identity+gaussian", "method=simclr,simsiam"], None),
        (
            ["pairs.positives=identity", "navigator.project=True,False"],
            ["identity project=True", "identity project=False"],
        ),
    ],
)
def test_names_tell_what_applies_to_an_arm(vary, names):
    settings = {"navigator.delta": "2"} if any("project" in word for word in vary) else {}
    study = expanded(*vary, settings=settings)
    found = [arm.name for arm in study.arms]
    assert found == names if names else len(found) == 4
    for arm in study.arms:
        config_of(study, arm)


def test_values_of_one_run_are_joined_by_plus():
    study = expanded("probe.evals=linear+knn,knn", "pretrain.lr=1e+0,2", settings={"pairs.positives": ("identity",)})
    assert [arm.name for arm in study.arms] == [
        f"{evals} lr={lr}" for evals in ("linear+knn", "knn") for lr in ("1e+0", "2")
    ]
    config = config_of(study, study.arms[0])
    assert config.probe.evals == ("linear", "knn") and config.pretrain.lr == 1.0


def test_a_studys_own_arms_are_multiplied_and_keep_their_baseline():
    arms = (Arm("ours", {"pairs.positives": "navigator"}), Arm("plain", {"pairs.positives": "identity"}))
    study = expanded("pretrain.augmentation=digits,none", arms=arms, baseline="plain")
    assert [arm.name for arm in study.arms] == ["ours digits", "ours none", "plain digits", "plain none"]
    assert study.baseline == "plain digits"


@pytest.mark.parametrize(
    ("vary", "fields", "message"),
    [
        (["pairs.positive=identity"], {}, "no setting pairs.positive: did you mean pairs.positives"),
        (["pretrain.lr"], {}, "write it as FIELD=VALUE"),
        (["pretrain.lr=1,"], {}, "write it as FIELD=VALUE"),
        (["pretrain.lr=1,1"], {}, "a value comes twice"),
        (["pretrain.lr=1", "--pretrain.lr=2"], {}, "the setting comes twice"),
        (["seed=1,2"], {}, "give --seeds"),
        (["stages=probe"], {}, "not for a study's settings"),
        (["positive.options=1"], {}, "one option at a time"),
        (["positive.options.std=1"], {}, r"positive.options.NAME.FIELD"),
        (["evals.options.detection.root=there"], {}, "no arm of the study has a part"),
        (["positive.options.*.stdd=1"], {}, "no arm of the study has a part"),
        (["pretrain.temperature=1"], {}, "has moved: write method.options"),
        (["pretrain.lr=1,2"], {"settings": {"pretrain.lr": "3"}}, "given and varied: .* what makes it 3"),
        (
            ["pretrain.lr=1,2"],
            {"arms": (Arm("a", {"pretrain.lr": "3"}),)},
            "--vary pretrain.lr: the study's arms differ",
        ),
        (["pairs.positives=identity"], {"settings": {"pretrain.data": "real"}}, "no arm of the study uses it"),
        ([], {"baseline": "nothing"}, "baseline 'nothing' is no arm .*: choose from identity, gaussian"),
        ([], {"arms": (Arm("a b"), Arm("a_b")), "settings": {"pairs.positives": "identity"}}, "would have one folder"),
        ([], {"arms": (Arm("../x"),), "settings": {"pairs.positives": "identity"}}, "expected a name"),
        ([], {"arms": (Arm("random"),), "settings": {"pairs.positives": "identity"}}, "take another name"),
        ([], {"arms": (Arm("a", {"no.thing": "1"}),)}, "arm a: there is no setting no.thing"),
        ([], {"preset": "nothing"}, "preset 'nothing' does not exist"),
    ],
)
def test_what_does_not_fit_is_one_line(vary, fields, message):
    with pytest.raises(UsageError, match=message) as error:
        expanded(*vary, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_words_give_a_preset_its_own_settings_again(preset):
    """Every setting of a preset, named: booleans, several values and options of parts among them."""
    config = PRESETS[preset]
    values = {_settings.CALLED.get(name, name): value for name, value in flat(dataclasses.asdict(config)).items()}
    settings = {
        name: tuple(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if name not in (*_settings.FAMILIES, "out", "seed", "stages")
    }
    base = next(iter(other for other in PRESETS if other != preset))
    options = {f"evals.options.{word.partition('=')[0]}": word.partition("=")[2] for word in config.probe.options}
    for word in (*PRESETS[base].pairs.options, *config.pairs.options):  # those of the base alone are taken back
        name, value = word.split("=")
        way, field = name.split(".")
        if way in config.pairs.positives:
            default = str(getattr(registry.options("positives", way), field))
            options[f"positive.options.{name}"] = value if word in config.pairs.options else default
    found = train.parse(_settings.words(base, settings | options))
    assert identity(found) == identity(config)


def test_options_are_added_to_those_of_a_presets_same_parts():
    settings = _settings.parse("--evals.options linear-augmented.lr=3 --probe.baselines random".split())
    found = train.parse(_settings.words("imagenet1k", settings))
    assert sorted(found.probe.options) == ["linear-augmented.epochs=60", "linear-augmented.lr=3"]
    assert found.probe.baselines == ("random",)
    other = train.parse(_settings.words("imagenet1k", {"probe.evals": ("knn",)}))
    assert other.probe.options == ()  # those of linear-augmented went with it
    assert _settings.words("imagenet1k", {}) == ["imagenet1k"]


def test_settings_are_read_from_the_words_of_train():
    words = (
        "--pretrain.cache-gib 1 --navigator.no-project --compile --probe.baselines --positive.options gaussian.std=.3"
    )
    assert _settings.parse(words.split()) == {
        "pretrain.cache_gib": "1",
        "navigator.project": "False",
        "compile": "True",
        "probe.baselines": (),
        "positive.options.gaussian.std": ".3",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrain.lr", "expected one value, got 0"),
        ("--pretrain.lr 1 2", "expected one value, got 2"),
        ("7", "belongs to no option"),
        ("--positive.options std", "write it as field=value"),
        ("--pretrain.leer 1", "did you mean pretrain.lr"),
        ("--out x", "not for a study"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        _settings.parse(words.split())


def test_every_setting_of_a_run_is_known():
    assert {"method", "positive.options", "evals.options", "generator.name"} <= _settings.FIELDS.keys()
    assert len(_settings.FIELDS) == len(flat(dataclasses.asdict(RunConfig())))
