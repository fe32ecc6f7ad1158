"""Settings of runs by the dotted names of config.json, and the words of `copgen_fast.train` that say them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from copgen_fast import registry
from copgen_fast.config import RunConfig, flat
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.record import RENAMED
from copgen_fast.studies import Settings

Value = str | tuple[str, ...]

CALLED = {"pairs.options": "positive.options", "probe.options": "evals.options", "method.name": "method"}
"""Fields of a run's configuration that the command line calls otherwise."""
_ALIASES = {"generator": "generator.name", "method.name": "method"}
FIELDS = {CALLED.get(name, name): default for name, default in flat(dataclasses.asdict(RunConfig())).items()}
"""Default of every setting, by its name on the command line."""

FAMILIES = {
    "generator.options": "generators",
    "positive.options": "positives",
    "method.options": "methods",
    "evals.options": "evals",
}
"""Options of parts: how their names start, and the kind of part."""
BY_NAME = ("positive.options", "evals.options")
"""Those of several parts, whose names go on with the part's: positive.options.gaussian.std."""
EVERY = "*"
"""In place of a part's name: whichever parts an arm has, of those with such an option."""

_TAKEN = {
    "out": "each run has its folder in the study's --out",
    "seed": "give --seeds",
    "stages": "a run has all that its results need",
    "pairs.part": "give --jobs",
    "pairs.parts": "give --jobs",
    "probe.baselines_only": "baselines are evaluated once for all runs",
}


def canonical(word: str) -> str:
    """The name of a setting as FIELDS and records have it, from `--pretrain.cache-gib` or the like.

    Raises:
        UsageError: there is none of that name, or a study decides it.
    """
    word = word.removeprefix("--")
    if family := family_of(word):
        return family + word[len(family) :].replace("-", "_") if family not in BY_NAME else _option_of_part(word)
    name = word.replace("-", "_")
    name = _ALIASES.get(name, name)
    if name in _TAKEN:
        raise UsageError(f"{word} is not for a study's settings: {_TAKEN[name]}")
    if name in RENAMED:
        raise UsageError(f"{word} has moved: write {RENAMED[name]}")
    if name in FAMILIES:
        raise UsageError(f"{word}: write {name}.{'NAME.' if name in BY_NAME else ''}FIELD, one option at a time")
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "`python -m copgen_fast.train PRESET --help` lists all"
        raise UsageError(f"there is no setting {word}: {hint}")
    return name


def family_of(name: str) -> str | None:
    """What an option of a part starts with; None for another setting, or for the options as a whole."""
    return next((family for family in FAMILIES if name.startswith(f"{family}.")), None)


def _option_of_part(name: str) -> str:
    head, _, field = name.rpartition(".")
    if head in FAMILIES:
        raise UsageError(f"there is no setting {name}: write it as {head}.NAME.FIELD, or {head}.{EVERY}.FIELD")
    return f"{head}.{field.replace('-', '_')}"


def parse(words: Iterable[str]) -> dict[str, Value]:
    """Settings of command line words, `--pretrain.epochs 3 --positive.options gaussian.std=.3`.

    Raises:
        UsageError: there is no such setting, or a word belongs to none.
    """
    found: dict[str, Value] = {}
    for flag, values in grouped(words):
        if flag in FAMILIES:
            for word in values:
                option, equals, value = word.partition("=")
                if not equals:
                    raise UsageError(f"option {word!r} of --{flag}: write it as field=value")
                found[canonical(f"{flag}.{option}")] = value
            continue
        section, _, last = flag.rpartition(".")
        positive = f"{section}.{last.removeprefix('no-')}".lstrip(".").replace("-", "_")
        if last.startswith("no-") and isinstance(FIELDS.get(positive), bool):
            found[positive] = "False"
            continue
        name = canonical(flag)
        if is_flag := isinstance(FIELDS.get(name), bool):
            values = values or ["True"]
        if is_several(name):
            found[name] = tuple(values)
        elif len(values) == 1:
            found[name] = values[0]
        else:
            raise UsageError(f"--{flag}: expected {'no value' if is_flag else 'one value'}, got {len(values)}")
    return found


def grouped(words: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Flags without their dashes, each with the words up to the next one."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UsageError(f"{word!r} belongs to no option: write settings as --NAME VALUE")
    return found


def is_several(name: str) -> bool:
    """Whether a setting takes several values."""
    return isinstance(FIELDS.get(name), tuple)


@dataclass(frozen=True)
class Parts:
    """The parts that a run has, by kind."""

    generator: str
    method: str
    positives: tuple[str, ...]
    evals: tuple[str, ...]
    real: bool
    """Pretrained on real images: ways of making positives are not used."""

    def named(self, family: str) -> tuple[str, ...]:
        """Those whose options are called by `family`."""
        return {
            "generator.options": (self.generator,),
            "method.options": (self.method,),
            "positive.options": () if self.real else self.positives,
            "evals.options": self.evals,
        }[family]


def parts_of(preset: str, settings: Settings) -> Parts:
    """The parts of a preset with `settings`."""
    base = PRESETS[preset]
    return Parts(
        str(settings.get("generator.name", base.generator.name)),
        str(settings.get("method", base.method.name)),
        as_tuple(settings.get("pairs.positives", base.pairs.positives)),
        as_tuple(settings.get("probe.evals", base.probe.evals)),
        settings.get("pretrain.data", base.pretrain.data) == "real",
    )


def as_tuple(value: Value) -> tuple[str, ...]:
    """A setting's values."""
    return (value,) if isinstance(value, str) else tuple(value)


def applied(name: str, parts: Parts) -> list[str]:
    """Under which names a setting applies to a run with `parts`: an option of a part that it lacks under none."""
    if parts.real and name == "pairs.positives":
        return []
    family = family_of(name)
    if family is None:
        return [name]
    kind, field = FAMILIES[family], name.rpartition(".")[2]
    if family not in BY_NAME:
        return [name] if field in _options(kind, *parts.named(family)) else []
    wanted = name[len(family) + 1 :].rpartition(".")[0]
    labels = {registry.label(part): part for part in parts.named(family)}
    if wanted == EVERY:
        return [f"{family}.{label}.{field}" for label, part in labels.items() if field in _options(kind, part)]
    return [name] if wanted in labels else []


def _options(kind: str, part: str) -> set[str]:
    return {field.name for field in dataclasses.fields(registry.config_class(kind, part))}


def applicable(preset: str, settings: Settings) -> dict[str, Value]:
    """Settings without options of parts that these settings leave out, and with parts' names in place of `*`."""
    parts = parts_of(preset, settings)
    every = {name: value for name, value in settings.items() if f".{EVERY}." in name}
    found = {new: value for name, value in every.items() for new in applied(name, parts)}
    plain = {name: value for name, value in settings.items() if name not in every}
    return found | {new: value for name, value in plain.items() for new in applied(name, parts)}


def words(preset: str, settings: Settings) -> list[str]:
    """Words of `copgen_fast.train` that give a preset these settings, which must be applicable to it.

    Options of parts are added to those that the preset has of the same parts.
    """
    found = [preset]
    given: dict[str, dict[str, str]] = {family: {} for family in FAMILIES}
    for name, value in settings.items():
        if family := family_of(name):
            given[family][name[len(family) + 1 :]] = ",".join(as_tuple(value))
        else:
            found += _option(name, value)
    base, parts = PRESETS[preset], parts_of(preset, settings)
    ours = {"positive.options": base.pairs.options, "evals.options": base.probe.options}
    for family, options in given.items():
        if options:
            kept = registry.options_of(ours.get(family, ()), parts.named(family))
            wanted = dict(word.partition("=")[::2] for word in kept) | options
            found += [f"--{family}", *(f"{name}={value}" for name, value in wanted.items())]
    return found


def _option(name: str, value: Value) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(FIELDS[name], bool) and value in ("True", "true"):
        return [flag]
    if isinstance(FIELDS[name], bool) and value in ("False", "false"):
        section, dot, last = flag[2:].rpartition(".")
        return [f"--{section}{dot}no-{last}"]
    return [flag, *as_tuple(value)]
