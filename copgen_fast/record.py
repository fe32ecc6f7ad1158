"""The record of a run, config.json: every setting that decides its results, so that a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

from copgen_fast import files, registry, schema
from copgen_fast.config import MethodConfig, RunConfig, flat
from copgen_fast.errors import CorruptArtifactError, UsageError

# What may differ between two invocations on one run folder: where and how much of it runs, not what it computes.
INVOCATION = (
    "stages",
    "out",
    "device",
    "timeout",
    "generator.checkpoint",
    "navigator.graph",
    "pairs.workers",
    "pairs.part",
    "pairs.parts",
    "pretrain.checkpoint",
    "pretrain.graph",
    "pretrain.workers",
    "pretrain.cache_gib",
    "pretrain.loader",
    "pretrain.on_corrupt",  # a run that stopped at a corrupt pair may go on without it
    "data.root",
    "data.on_corrupt",
    "evals.options.detection.root",
    "evals.options.transfer.root",
    "probe.baselines_only",
)


def identity(config: RunConfig, processes: int = 1) -> dict[str, object]:
    """The settings that decide a run's results, as dotted names and plain JSON values; options of parts with defaults.

    The number of processes that compute a batch is part of it where batch norm's statistics depend on it: those of
    each one's rows, or of a part of each one's rows.

    Raises:
        UsageError: a part that doesn't exist, or an option that does not fit.
    """
    values = json.loads(json.dumps(flat(dataclasses.asdict(config))))
    for name in (*_PART_OPTIONS, "method.name"):
        del values[name]
    values |= {"method": config.method.name} | _part_options(config)
    kept = {name: value for name, value in values.items() if name not in INVOCATION}
    # By its content: the file may lie elsewhere each time. Stages that need no generator do without it.
    if config.generator.weights is not None and os.path.exists(config.generator.weights):
        kept[WEIGHTS_DIGEST] = files.content_digest(config.generator.weights)
    depends = config.bn == "per-rank" or config.pretrain.accumulate > 1
    return kept | ({"processes": processes} if depends else {})


WEIGHTS, WEIGHTS_DIGEST = "generator.weights", "generator.weights.sha256"

_PART_OPTIONS = {
    "generator.options": "generator.options",
    "method.options": "method.options",
    "pairs.options": "positive.options",
    "probe.options": "evals.options",
}
"""Fields that hold options of parts, and how their names start in a record."""


def _part_options(config: RunConfig) -> dict[str, object]:
    """Every option of every part by its dotted name, and digests of the files that parts come from."""
    found = {
        "generator.options": registry.options("generators", config.generator.name, config.generator.options),
        "method.options": registry.options("methods", config.method.name, config.method.options),
    }
    by_name = {
        "positive.options": registry.options_by_name("positives", config.pairs.positives, config.pairs.options),
        "evals.options": registry.options_by_name("evals", config.probe.evals, config.probe.options),
    }
    for prefix, of in by_name.items():
        found |= {f"{prefix}.{registry.label(name)}": options for name, options in of.items()}
    values = {f"{prefix}.{name}": x for prefix, of in found.items() for name, x in registry.as_record(of).items()}
    files = (config.generator.name, config.method.name, *config.pairs.positives, *config.probe.evals)
    return values | {f"{name}.sha256": registry.sha256(name) for name in files if name.endswith(".py")}


def defaults(config: RunConfig) -> dict[str, object]:
    """The default of every setting, and of every option of the parts that `config` has."""
    changes = {
        section: dataclasses.replace(getattr(config, section), options=())
        for section in (name.partition(".")[0] for name in _PART_OPTIONS)
    }
    options = _part_options(dataclasses.replace(config, **changes))
    return identity(RunConfig()) | {name: value for name, value in options.items() if ".options." in name}


def from_identity(values: dict[str, object]) -> RunConfig:
    """The configuration of a record made by `identity`; settings that it lacks take their defaults."""
    values = dict(values)
    for name, prefix in _PART_OPTIONS.items():
        found = {key.removeprefix(f"{prefix}."): values[key] for key in values if key.startswith(f"{prefix}.")}
        values[name] = [f"{key}={_word(value)}" for key, value in found.items()]
    values["method.name"] = values.get("method", MethodConfig.name)
    return _replaced(RunConfig(), values)


def expect_current(values: dict[str, object], folder: Path) -> None:
    """Raises UsageError for a record of version 0.1, whose options and folders were others."""
    if old := [name for name in RENAMED if name in values]:
        raise UsageError(
            f"{folder} holds a run of copgen_fast 0.1, which had {old[0]} (now {RENAMED[old[0]]}): go on with that "
            "version, or choose another --out"
        )


def changes(there: dict[str, object], here: dict[str, object]) -> list[str]:
    """`differences` of two records where files are the same if their content is, whatever their paths."""
    if WEIGHTS_DIGEST in there:
        dropped = (WEIGHTS,) if WEIGHTS_DIGEST in here else (WEIGHTS, WEIGHTS_DIGEST)
    else:
        dropped = (WEIGHTS_DIGEST,)  # recorded without the file
    there, here = (
        {name: value for name, value in _with_contents(values).items() if name not in dropped}
        for values in (there, here)
    )
    return differences(there, here)


def _with_contents(values: dict[str, object]) -> dict[str, object]:
    """A record with files of parts by name and digest in place of their paths."""
    digests = {name.removesuffix(".sha256"): value for name, value in values.items() if name.endswith(".py.sha256")}

    def known(value: object) -> object:
        if isinstance(value, list):
            return [known(item) for item in value]
        if isinstance(value, str) and value in digests:
            return f"{registry.label(value)}.py of sha256 {digests[value]}"
        return value

    return {name: known(value) for name, value in values.items() if not name.endswith(".py.sha256")}


def expect_valid(values: object, path: Path) -> None:
    """Raises CorruptArtifactError unless `values`, read from a config.json, are settings of the right types."""
    try:
        for name, value in schema.check(values, dict[str, Any]).items():
            schema.check(value, _hints().get(name, _JSON), name)
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: {error}: choose another --out, or restore that file") from error


_SCALAR = None | bool | int | float | str
_JSON = _SCALAR | tuple[_SCALAR, ...]


@functools.cache
def _hints() -> dict[str, Any]:
    """Types of all settings by their dotted names, but for options of parts, whose words are parsed."""

    def of(cls: type, prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, hint in get_type_hints(cls).items():
            found |= of(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
        return found

    return {"method": str} | {name: hint for name, hint in of(RunConfig).items() if name not in _PART_OPTIONS}


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _replaced(default: object, values: dict[str, object], prefix: str = "") -> object:
    changes = {}
    for name in (part.name for part in dataclasses.fields(default)):
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _replaced(current, values, f"{prefix}{name}.")
        elif prefix + name in values:
            value = values[prefix + name]
            changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(default, **changes)


RENAMED = {
    "generator.truncation": "generator.options truncation=VALUE",
    "pairs.gaussian_std": "positive.options gaussian.std=VALUE",
    "pairs.gaussian_prior": "positive.options gaussian.prior=VALUE",
    "pretrain.loss": "method simclr (nt-xent) or supcon",
    "pretrain.temperature": "method.options temperature=VALUE",
    "pretrain.base_temperature": "method.options base_temperature=VALUE",
    "probe.neighbours": "evals.options knn.neighbours=VALUE",
    "probe.shots": "evals.options lowshot.shots=VALUE",
    "probe.draws": "evals.options lowshot.draws=VALUE",
    "probe.epochs": "evals.options linear-augmented.epochs=VALUE",
    "probe.lr": "evals.options linear-augmented.lr=VALUE",
    "probe.augmentation": "evals.options linear-augmented.augmentation=VALUE",
}
"""Options of version 0.1, and what they are called now."""


def differences(there: dict[str, object], here: dict[str, object]) -> list[str]:
    """Names at which two identities differ, with both values."""
    names = sorted(there.keys() | here.keys())
    return [
        f"{name} ({_short(there.get(name))} there, {_short(here.get(name))} here)"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
