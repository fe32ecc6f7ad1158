"""Loading parts by name: built in, from an installed module, or from a file of the user's own.

A kind of part is a folder of the package; every public module in it is a part, named as its file (with - for _).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from copgen_fast import files
from copgen_fast.errors import USER_MODULE, UsageError, in_one_line
from copgen_fast.options import parse

KINDS = {
    "generators": "--generator.options FIELD=VALUE",
    "positives": "--positive.options NAME.FIELD=VALUE",
    "methods": "--method.options FIELD=VALUE",
    "evals": "--evals.options NAME.FIELD=VALUE",
    "studies": "--study.options FIELD=VALUE",
}
"""Kinds of parts, and how the command line takes their options."""

FUNCTIONS = {
    "generators": "build(weights, config)",
    "positives": "build(setting)",
    "methods": "build(encoder, config)",
    "evals": "evaluate(encoder, config, run)",
    "studies": "build(config)",
}
"""The function that a part of a kind has."""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a part that has none."""


@functools.cache  # a training step may ask, and the folder is read for 0.5 ms
def names(kind: str) -> tuple[str, ...]:
    """Built-in parts of a kind ("generators", "positives", ...: see `KINDS`), sorted."""
    path = importlib.import_module(f"copgen_fast.{kind}").__path__
    found = (module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))
    return tuple(sorted(name.replace("_", "-") for name in found if name != "fit"))


def load(kind: str, name: str) -> ModuleType:
    """Import a part.

    Args:
        kind: one of `KINDS`.
        name: a built-in part ("byol"), a dotted module ("my_package.my_gan") or a Python file ("./my_gan.py").

    Raises:
        UsageError: nothing goes by that name (the message lists the built-in ones), or importing it fails.
    """
    if name.endswith(".py") or "/" in name:
        return _load_file(kind, Path(name).expanduser())
    if "." in name.strip("."):
        return _import(kind, name, name)
    known = names(kind)
    if name not in known:
        raise UsageError(
            f"unknown name {name!r} in {kind}: choose from {', '.join(known)}, or give a module (my_package.my_part) "
            "or a file (./my_part.py)"
        )
    return importlib.import_module(f"copgen_fast.{kind}.{name.replace('-', '_')}")


def function(kind: str, name: str) -> Callable[..., Any]:
    """The function of `FUNCTIONS` of a part; UsageError where it has none."""
    wanted = FUNCTIONS[kind]
    found = getattr(load(kind, name), wanted.partition("(")[0], None)
    if not callable(found):
        raise UsageError(f"{kind} {name} has no function {wanted}")
    return found


def label(name: str) -> str:
    """The short name of a part in folders and tables: `my_gan` of `./my_gan.py` and of `my_package.my_gan`."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def kind_of(name: str) -> str:
    """The kind of a part that is given as a file or a module, by what it defines."""
    module = load("generators", name)
    if hasattr(module, "evaluate"):
        return "evals"
    parameters = list(inspect.signature(module.build).parameters) if hasattr(module, "build") else []
    kinds = {"setting": "positives", "weights": "generators", "encoder": "methods", "config": "studies"}
    if not parameters or parameters[0] not in kinds:
        raise UsageError(
            f"{name} is no part: it has neither evaluate(encoder, config, run) nor build(weights, config), "
            "build(encoder, config), build(setting) or build(config)"
        )
    return kinds[parameters[0]]


def sha256(name: str) -> str:
    """Digest of the file of a part that is given as a file."""
    return files.sha256(Path(name).expanduser())


def config_class(kind: str, name: str) -> type:
    """The dataclass of a part's options: its `Config`, or `NoOptions`.

    Raises:
        UsageError: no such part, or its `Config` is no frozen dataclass, or has a field without default.
    """
    found = getattr(load(kind, name), "Config", NoOptions)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen):
        raise UsageError(f"{kind} {name}: its Config must be a dataclass, decorated by @dataclass(frozen=True)")
    for field in dataclasses.fields(found):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{kind} {name}: its Config must give {field.name} a default")
    return found


def as_record(config: Any) -> dict[str, Any]:
    """Fields of a part's options as plain JSON values, for the record of a run."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def options(kind: str, name: str, given: Iterable[str] = ()) -> Any:
    """The options of a part as an instance of its `Config`; what is not given takes its default.

    Args:
        given: words of the form "field=value"; values of a tuple are separated by commas.

    Raises:
        UsageError: a word of another form, a field that the part does not have, or a value that does not fit.
    """
    cls = config_class(kind, name)
    fields = {field.name for field in dataclasses.fields(cls)}
    arguments: list[str] = []
    for word in given:
        field, equals, value = word.partition("=")
        field = field.replace("-", "_")
        if not equals:
            raise UsageError(f"option {word!r} of {label(name)}: write it as field=value")
        if field not in fields:
            there = f"choose from {', '.join(sorted(fields))}" if fields else "it has none"
            raise UsageError(f"option {field!r} of {label(name)} ({kind}) does not exist: {there}")
        several = typing.get_origin(typing.get_type_hints(cls)[field]) is tuple
        arguments += [f"--{field.replace('_', '-')}", *([] if several and not value else value.split(","))]
    return _parse(cls, arguments, f"{label(name)} ({kind})")


def options_by_name(kind: str, names: Sequence[str], given: Iterable[str]) -> dict[str, Any]:
    """The options of several parts, by name.

    Args:
        given: words of the form "part.field=value", with the part's `label`.

    Raises:
        UsageError: two parts of one label, a part that is not among them, or as `options`.
    """
    words: dict[str, list[str]] = {}
    for name in names:
        if label(name) in words:
            raise UsageError(f"{kind}: two of them are called {label(name)!r}: leave one out, or rename its file")
        words[label(name)] = []
    for word in given:
        part, _, rest = word.partition(".")
        if part not in words:
            raise UsageError(f"option {word!r} ({kind}): write it as NAME.field=value, NAME one of {', '.join(words)}")
        words[part].append(rest)
    return {name: options(kind, name, words[label(name)]) for name in names}


def options_of(given: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Of words "part.field=value" those of the parts called `names`."""
    labels = set(map(label, names))
    return tuple(word for word in given if word.partition(".")[0] in labels)


def describe(kind: str, name: str) -> str:
    """The options of a part, a line each with type, default and explanation, as help text."""
    import tyro

    cls, out = config_class(kind, name), io.StringIO()
    if not dataclasses.fields(cls):
        return f"{label(name)} ({kind}): no options\n"
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"], config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    listed = out.getvalue().partition("\n\n")[2].replace("  --", "  ")
    given = KINDS[kind].replace("NAME", label(name))
    return f"{label(name)} ({kind}), given as {given}\n{listed}"


def _parse(cls: type, arguments: list[str], of: str) -> Any:
    import tyro

    try:
        return parse(cls, arguments, config=(tyro.conf.FlagConversionOff,))
    except (UsageError, ValueError) as error:  # ValueError: of the dataclass's own checks
        raise UsageError(f"options of {of}: {str(error).removeprefix('--')}") from error


def _load_file(kind: str, path: Path) -> ModuleType:
    """Import a file under a name that its whole path decides, once for each content of it."""
    if not path.is_file():
        raise UsageError(f"{kind} {path}: there is no such file")
    path = path.resolve()
    content = files.sha256(path)[:12]
    module = f"{USER_MODULE}{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}_{content}"
    if module in sys.modules and sys.modules[module].__file__ == str(path):
        return sys.modules[module]
    spec = importlib.util.spec_from_file_location(module, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[module] = found  # dataclasses look their module up
    try:
        spec.loader.exec_module(found)
    except (Exception, SystemExit) as error:  # SystemExit: of a script
        del sys.modules[module]
        raise UsageError(f"{kind} {path}: importing it fails with {in_one_line(error)}") from error
    return found


def _import(kind: str, module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{kind} {name}: importing it fails with {in_one_line(error)}") from error
