"""Options of every command: parsing by tyro, ranges of numbers, `~` in paths.

    lr: Annotated[float, Range(1e-12, 1e3)] = 0.1

declares a number's range beside it. Outside are values that are surely a slip, or that float32 arithmetic can't bear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from copgen_fast.errors import UsageError

_Config = TypeVar("_Config")
_MANY = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, both allowed."""

    low: float
    high: float = _MANY

    def __str__(self) -> str:
        return f"{self.low:g} or more" if self.high == _MANY else f"{self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Marks a string as a path."""


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
LearningRate = Annotated[float, Range(1e-12, 1e3)]
Temperature = Annotated[float, Range(1e-4, 1e4)]
Place = Annotated[str, _Place()]
"""A path, kept as text."""


def parse(cls: Any, arguments: Sequence[str] | None, prog: str | None = None, **settings: Any) -> Any:
    """Command line arguments as an instance of a dataclass, in range and with `~` expanded; default: sys.argv's.

    Args:
        cls: a dataclass, or a union of them as tyro takes it.
        settings: further arguments of tyro.cli.

    Raises:
        UsageError: an unknown option, or a value that does not fit.
        SystemExit: help was printed.
    """
    words = tuple(sys.argv[1:] if arguments is None else arguments)
    if any("\0" in word for word in words):
        raise UsageError("an argument holds a NUL character: leave it out")
    config = expanded(_parse(cls, words, prog, tuple(settings.items())))
    expect_ranges(config)
    return config


# tyro makes a parser anew each time, and each check of a run's record parses the options of all parts.
@functools.lru_cache(maxsize=1024)
def _parse(cls: Any, words: tuple[str, ...], prog: str | None, settings: tuple[tuple[str, Any], ...]) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=words, prog=prog, **dict(settings))
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(one_line(complaint.getvalue())) from error


def out_of_range(config: Any, prefix: str = "") -> list[str]:
    """Numbers of a dataclass, and of those in it, that are outside of their declared `Range`, a line each."""
    found = []
    for name, value, marks in fields_of(config):
        if dataclasses.is_dataclass(value):
            found += out_of_range(value, f"{prefix}{name}.")
        for bounds in (mark for mark in marks if isinstance(mark, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not bounds.low <= number <= bounds.high:  # NaN is never within
                    found.append(f"{prefix}{name}: expected {bounds}, got {number}")
    return found


def expect_ranges(config: Any) -> None:
    """Raises UsageError, with the option's name, where a number is outside of its declared `Range`."""
    for fault in out_of_range(config):
        name, _, rest = fault.partition(":")
        raise UsageError(f"--{name.replace('_', '-')}:{rest}")


def check_ranges(config: Any) -> None:
    """Raises ValueError where a number of a dataclass is outside of its declared `Range`; for `__post_init__`."""
    for fault in out_of_range(config):
        raise ValueError(fault)


def expanded(config: _Config) -> _Config:
    """A dataclass, and those in it, with `~` and `~user` in paths (`Path`, or `Place`) replaced by home folders."""
    if not dataclasses.is_dataclass(config):
        return config
    changes = {}
    for name, value, marks in fields_of(config):
        text = isinstance(value, str) and any(isinstance(mark, _Place) for mark in marks)
        new = os.path.expanduser(value) if text else _expanded_path(value)
        if new != value:
            changes[name] = new
    return dataclasses.replace(config, **changes)


def _expanded_path(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, tuple):
        return tuple(map(_expanded_path, value))
    return expanded(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def fields_of(config: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, value (default, of a class) and what Annotated says of every field of a dataclass."""
    cls = config if isinstance(config, type) else type(config)
    hints = _type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name, getattr(config, field.name, None), list(_marks(hints[field.name]))


@functools.lru_cache(maxsize=1024)
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _marks(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is Annotated:
        yield from hint.__metadata__
        yield from _marks(hint.__origin__)
    elif typing.get_origin(hint) in (types.UnionType, typing.Union, tuple):
        for member in typing.get_args(hint):
            yield from _marks(member)


def one_line(box: str) -> str:
    """tyro's message, framed or plain, as one line without its title and what it tells of help."""
    title, *lines = box.splitlines() or [""]
    text = " ".join(line.strip("│| ") for line in lines or [title])
    text = re.split("For full helptext|Argument helptext:|Got errors:", text)[0]
    text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{4,}", " ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"^Error parsing \w+: ", "", text)  # of a dataclass's own checks
