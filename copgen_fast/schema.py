"""Values of JSON files checked against type hints: the file, the field, what came and what was expected."""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LONGEST = 2**26
"""Bytes of the longest JSON text that is read."""


def parse(data: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, or longer or deeper than any record here.
    """
    if len(data) > LONGEST:
        raise ValueError(f"{len(data)} bytes long")
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check(value: Any, hint: type[T] | Any, field: str = "") -> T:
    """`value` of JSON as `hint` says: dataclasses are made of objects, and tuples of lists.

    Args:
        hint: a dataclass, int (of 64 bits), float, str, bool, None, Any, Literal, dict[str, ...], tuple[...] or a
            union of these.
        field: the value's name, for the message.

    Raises:
        ValueError: another value; the message says where.
    """
    if hint is float:
        return _expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, "a number", field)
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        return _expect(whole, value, "an integer of 64 bits", field)
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return check(value, of[0], field)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in of:
            return value
        kinds = [kind for kind in of if kind is not type(None)]
        for kind in kinds[:-1]:
            try:
                return check(value, kind, field)
            except ValueError:
                continue
        return check(value, kinds[-1], field)
    if origin is Literal:
        return _expect(value in of if isinstance(value, (str, int)) else False, value, f"one of {of}", field)
    if origin is dict:
        _expect(isinstance(value, dict), value, "an object", field)
        return {name: check(item, of[1], _join(field, name)) for name, item in value.items()}
    if origin is tuple:
        kinds = of[:1] * len(value) if of[-1] is Ellipsis and isinstance(value, (list, tuple)) else of
        listed = isinstance(value, (list, tuple)) and len(value) == len(kinds)
        _expect(listed, value, "a list" if of[-1] is Ellipsis else f"a list of {len(of)}", field)
        return tuple(
            check(item, kind, f"{field}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        return _check_dataclass(value, hint, field)
    return _expect(isinstance(value, hint), value, _NAMES[hint], field)


_NAMES = {str: "text", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}


def _check_dataclass(value: Any, cls: type[T], field: str) -> T:
    _expect(isinstance(value, dict), value, "an object", field)
    hints = _hints(cls)
    for part in dataclasses.fields(cls):
        needed = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
        if needed and part.name not in value:
            raise ValueError(f"{_join(field, part.name)} is missing")
    for name in value:
        if name not in hints:
            raise ValueError(f"{_join(field, reprlib.repr(name))} is no field of it")
    return cls(**{name: check(item, hints[name], _join(field, name)) for name, item in value.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _expect(holds: bool, value: Any, what: str, field: str) -> Any:
    if not holds:
        raise ValueError(f"{field or 'its content'}: expected {what}, got {reprlib.repr(value)}")
    return value


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
