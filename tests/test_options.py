"""Ranges of numbers and `~` in paths, of every command and part."""

import dataclasses
import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from bench import __main__ as bench
from copgen_fast import options, registry, train, verify
from copgen_fast.config import PairsConfig, RunConfig, faults, flat
from copgen_fast.doctor.__main__ import DoctorConfig
from copgen_fast.errors import UsageError
from copgen_fast.generators.fit.digits import FitConfig
from copgen_fast.generators.fit.residual_flow import FlowConfig
from copgen_fast.generators.fit.resnet_gan import GanConfig
from copgen_fast.options import Place, Range
from copgen_fast.presets import PRESETS
from copgen_fast.studies._calibrate import CalibrateConfig
from copgen_fast.study import StudyConfig

PARTS = [registry.config_class(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
OTHERS = [
    CalibrateConfig,
    verify.VerifyConfig,
    StudyConfig,
    DoctorConfig,
    FitConfig,
    FlowConfig,
    GanConfig,
    bench.Options,
    bench.GpuOptions,
]


def sections(cls):
    """A dataclass and those in its fields' defaults."""
    yield cls
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            yield from sections(type(default))


@pytest.mark.parametrize(
    "box",
    [
        """╭─ Value error ─────────────────╮
│ Error parsing --jobs: no type │
│ matches ['x'].                │
│                               │
│ Got errors:                   │
│ - of int: invalid             │
│ ───────────────────────────── │
│ Argument helptext:            │
│     --jobs INT                │
│ ───────────────────────────── │
│ For full helptext, see --help │
╰───────────────────────────────╯
""",
        " Value error    \n -----------------\n  Error parsing --jobs: no type \n  matches ['x'].  \n  -------\n"
        "  Argument helptext: \n      --jobs INT\n  -------\n  For full helptext, see --help\n",
    ],
    ids=["framed", "plain"],
)
def test_a_value_that_does_not_fit_is_told_without_title_and_help(box):
    assert options.one_line(box) == "Error parsing --jobs: no type matches ['x']."


@pytest.mark.parametrize(
    "cls", dict.fromkeys(section for cls in (RunConfig, *PARTS, *OTHERS) for section in sections(cls))
)
def test_every_number_has_a_range_that_its_default_is_in(cls):
    ranges = {name: marks for name, _, marks in options.fields_of(cls)}
    for field in dataclasses.fields(cls):
        if re.match(r"(tuple\[)?(int|float)\b", field.type) or isinstance(field.default, (int, float)):
            if not isinstance(field.default, bool):
                assert any(isinstance(mark, Range) for mark in ranges[field.name]), f"{cls.__qualname__}.{field.name}"
    parameters = inspect.signature(cls).parameters.values()
    required = {parameter.name: Path("x") for parameter in parameters if parameter.default is parameter.empty}
    assert options.out_of_range(cls(**required)) == []


@pytest.mark.parametrize(
    "words",
    [
        "--navigator.temperature 1e-40",
        "--navigator.base-temperature inf",
        "--navigator.lr 1e-40",
        "--navigator.estimator-lr 1e30",
        "--navigator.delta 1e-40",
        "--pretrain.lr nan",
        "--pretrain.momentum 1.5",
        "--pretrain.weight-decay -1",
        "--pretrain.cache-gib 1e300",
        "--timeout 1e30",
        "--timeout 1e-40",
        "--seed 9223372036854775808",
        "--navigator.batch 99999999999",
        "--navigator.estimator.width 99999999",
        "--data.image-size 1000000",
        "--method.options temperature=1e-40",
        "--method.options base_temperature=1e30",
        "--positive.options gaussian.std=1e300",
        "--evals.options knn.neighbours=-1",
        "--probe.evals linear-augmented --evals.options linear-augmented.lr=1e-40",
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(words, tmp_path, capsys):
    assert train.main(["quickstart", *words.split(), "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ": expected " in said and ", got " in said
    assert not (tmp_path / "run").exists()


def test_the_least_and_largest_numbers_are_allowed():
    @dataclass
    class Config:
        share: Annotated[float, Range(0, 1)]
        count: options.Count | None = None

    for share in (0, 1):
        assert options.out_of_range(Config(share)) == []
    assert options.out_of_range(Config(math.nextafter(1, 2))) == [f"share: expected 0 to 1, got {math.nextafter(1, 2)}"]
    assert options.out_of_range(Config(0, 0)) == ["count: expected 1 or more, got 0"]
    with pytest.raises(ValueError, match="share: expected 0 to 1, got nan"):
        options.check_ranges(Config(math.nan))


def test_ranges_hold_for_the_library_too():
    assert faults(RunConfig(pairs=PairsConfig(batch=0))) == ["pairs.batch: expected 1 or more, got 0"]


def test_a_tilde_in_any_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = train.parse(["quickstart", "--out=~/x", "--data.root", "~/d", "--generator.weights", "~/w.pth"])
    assert (config.out, config.data.root, config.generator.weights) == ("/home/me/x", "/home/me/d", "/home/me/w.pth")
    check = options.parse(bench.CheckOptions, ["~/a.json", "b~.json"])
    assert check.files == (Path("/home/me/a.json"), Path("b~.json"))
    assert options.parse(verify.VerifyConfig, ["~/x"]).run == Path("/home/me/x")
    assert options.parse(DoctorConfig, ["--json", "~/x"]).json == Path("/home/me/x")


def test_text_with_a_tilde_that_is_no_path_stays():
    @dataclass
    class Config:
        word: str = "~"
        place: Place = "~nobody-of-this-name/x"

    assert options.expanded(Config()) == Config()


def test_presets_are_in_range():
    for preset in PRESETS.values():
        assert faults(preset) == [] and flat(dataclasses.asdict(options.expanded(preset)))


def test_an_unknown_option_is_one_line():
    with pytest.raises(UsageError, match="^Unrecognized options.*--sample") as error:
        options.parse(verify.VerifyConfig, ["run", "--sample", "3"])
    assert "\n" not in str(error.value)
