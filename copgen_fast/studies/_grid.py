"""A study's arms and seeds: the product of varied settings, and the parts of a command line that say them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from copgen_fast import registry
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.studies import Arm, Study
from copgen_fast.studies._settings import (
    Value,
    applicable,
    applied,
    as_tuple,
    canonical,
    family_of,
    is_several,
    parts_of,
)

Vary = Mapping[str, tuple[Value, ...]]
"""Values of each varied setting."""
RESERVED = ("random", "pixels")
"""What results call an untrained encoder and raw pixels."""
MOST = 10_000
"""Seeds, or arms: more are a slip."""
_PARTS = ("generator.name", "method", "pairs.positives", "probe.evals")


def seeds(text: str) -> tuple[int, ...]:
    """Seeds of `0..4` (both ends), `0,3,7`, or both forms mixed.

    Raises:
        UsageError: another form, a seed that comes twice, or too many.
    """
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d{1,18})(?:\.\.(\d{1,18}))?\s*", part)):
            raise UsageError(f"--seeds {text}: write them as 0..4, or 0,3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST:
            raise UsageError(f"--seeds {part}: expected a range of 1 to {MOST} seeds, from the first to the last")
        found += range(first, last + 1)
    if twice := sorted({seed for seed in found if found.count(seed) > 1} if len(found) <= MOST else ()):
        raise UsageError(f"--seeds {text}: {twice[0]} comes twice")
    return tuple(found)


def vary(words: Iterable[str]) -> dict[str, tuple[Value, ...]]:
    """Varied settings of `FIELD=a,b`; several values that one run has together are joined by `+`.

    Raises:
        UsageError: another form, no such setting, one that comes twice, or a value that does.
    """
    found: dict[str, tuple[Value, ...]] = {}
    for word in words:
        field, equals, text = word.partition("=")
        values = text.split(",")
        if not equals or not all(values):
            raise UsageError(f"--vary {word}: write it as FIELD=VALUE,VALUE")
        name = canonical(field)
        if name in found or len(set(values)) < len(values):
            raise UsageError(f"--vary {word}: {'the setting' if name in found else 'a value'} comes twice")
        found[name] = tuple(_together(name, value) for value in values)
    return found


def _together(name: str, value: str) -> Value:
    if not (is_several(name) or family_of(name)):
        return value
    several = tuple(re.split(r"(?<![0-9.][eE])\+", value))  # not the exponent's of 1e+5
    return several if len(several) > 1 or is_several(name) else value


def expand(study: Study, varied: Vary) -> Study:
    """The study with its arms multiplied by the product of varied settings, and one way of making positives in each.

    Options of parts that an arm lacks are left out of it, and arms that are equal then are one.

    Raises:
        UsageError: settings that there are not, that both vary and are given, or that no arm has a part for; names of
            arms that can't be folders.
    """
    if study.preset not in PRESETS:
        raise UsageError(f"the study's preset {study.preset!r} does not exist: choose from {', '.join(PRESETS)}")
    fixed = {canonical(name): value for name, value in study.settings.items()}
    arms = [Arm(arm.name, _canonical(arm)) for arm in study.arms] or [Arm("")]
    for name in varied:
        if any(name in arm.settings for arm in arms):
            raise UsageError(f"--vary {name}: the study's arms differ in it: leave it out")
        if name in fixed:
            value = " ".join(as_tuple(fixed[name]))
            raise UsageError(f"{name} is given and varied: leave it out of --vary, or what makes it {value}")
    found: dict[str, Arm] = {}
    for arm, values in itertools.product(arms, itertools.product(*varied.values())):
        own = dict(zip(varied, values, strict=True))
        for way, new in _split(study.preset, fixed, dict(arm.settings) | own):
            parts = parts_of(study.preset, fixed | new)
            shown = [_shown(name, value, varied) for name, value in own.items() if applied(name, parts)]
            name = " ".join(filter(None, [arm.name, *shown, way])) or _only(parts.positives, parts.real)
            found.setdefault(name, Arm(name, new))
    if len(found) > MOST:
        raise UsageError(f"{len(found)} arms are more than {MOST}: vary less")
    result = dataclasses.replace(study, settings=fixed, arms=tuple(found.values()))
    _expect_used(result)
    _expect_folders(result)
    return dataclasses.replace(
        result, arms=tuple(Arm(arm.name, _of_arm(result, arm)) for arm in result.arms), baseline=_baseline(result)
    )


def _canonical(arm: Arm) -> dict[str, Value]:
    try:
        return {canonical(name): value for name, value in arm.settings.items()}
    except UsageError as error:
        raise UsageError(f"arm {arm.name}: {error}") from error


def _split(
    preset: str, fixed: Mapping[str, Value], settings: dict[str, Value]
) -> Iterable[tuple[str, dict[str, Value]]]:
    """An arm's settings for each way of making positives that they name, with what tells it apart."""
    parts = parts_of(preset, fixed | settings)
    if parts.real or len(parts.positives) == 1:
        return [("", settings)]
    return [(registry.label(way), settings | {"pairs.positives": (way,)}) for way in parts.positives]


def _of_arm(study: Study, arm: Arm) -> dict[str, Value]:
    """The settings in which an arm differs, without those that don't apply to it."""
    whole = applicable(study.preset, {**study.settings, **arm.settings})
    return {name: value for name, value in whole.items() if study.settings.get(name) != value}


def _only(positives: tuple[str, ...], real: bool) -> str:
    return "real" if real else registry.label(positives[0])


def _shown(name: str, value: Value, varied: Vary) -> str:
    """What an arm's name says of a varied setting: a word by itself, numbers and ambiguous words as field=value."""
    values = varied[name]
    texts = {other: {_text(other, x) for x in varied[other]} for other in varied}
    plain = all(_is_word(_text(name, x)) for x in values)
    if plain and not any(texts[name] & texts[other] for other in varied if other != name):
        return _text(name, value)
    leaf = name.rpartition(".")[2]
    if sum(other.rpartition(".")[2] == leaf for other in varied) > 1:
        leaf = name.replace("*", "every")
    return f"{leaf}={_text(name, value)}"


def _text(name: str, value: Value) -> str:
    words = (registry.label(word) if name in _PARTS else Path(word).name for word in as_tuple(value))
    return re.sub(r"[^\w.=+-]", "-", "+".join(words), flags=re.ASCII)


def _is_word(text: str) -> bool:
    return re.match(r"[A-Za-z]", text) is not None and text not in ("True", "False", "None", "inf", "nan")


def _expect_used(study: Study) -> None:
    """Raises UsageError for an option of a part that no arm has, or ways of making positives where all are real."""
    every = [{**study.settings, **arm.settings} for arm in study.arms]
    for name in dict.fromkeys(name for settings in every for name in settings):
        if not any(name in one and applied(name, parts_of(study.preset, one)) for one in every):
            what = "has a part with this option" if family_of(name) else "uses it, with --pretrain.data real"
            raise UsageError(f"{name}: no arm of the study {what}")


def _expect_folders(study: Study) -> None:
    """Raises UsageError where names of arms can't name folders, or not one each."""
    folders: dict[str, str] = {}
    for arm in study.arms:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.=+-]{0,199}", arm.name):
            raise UsageError(
                f"arm {arm.name!r}: expected a name of at most 200 letters, digits, spaces and -_.=+, from a letter or "
                "digit on"
            )
        if arm.name in RESERVED:
            raise UsageError(f"arm {arm.name}: results call a baseline so: take another name")
        folder = folder_of(arm.name)
        if folder in folders:
            raise UsageError(f"arms {folders[folder]!r} and {arm.name!r} would have one folder: rename one")
        folders[folder] = arm.name


def folder_of(arm: str) -> str:
    """The name of an arm's folder."""
    return arm.replace(" ", "_")


def _baseline(study: Study) -> str:
    """The arm that others are compared with: the named one, or the first that was made of it.

    Raises:
        UsageError: there is none.
    """
    names = [arm.name for arm in study.arms]
    if study.baseline in names:
        return study.baseline
    if not study.baseline:
        return names[0]
    if made := [name for name in names if name.startswith(f"{study.baseline} ")]:
        return made[0]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise UsageError(f"baseline {study.baseline!r} is no arm of the study: choose from {shown}")
