"""A generator from a torch.export file (.pt2): --generator.name export --generator.weights FILE.

torch.export.load by itself unpickles parts of such files, loads compiled libraries from them, evaluates their
expressions and makes Python source of their names. It is given a copy that holds none of this: tensors as plain bytes,
operations of PyTorch's core alone, sizes as plain arithmetic, names without punctuation; other files are refused.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from copgen_fast.errors import UsageError, in_one_line
from copgen_fast.generators._compiled import Compiled, Config, archive

__all__ = ["Config", "build"]

_MAKE = "torch.export.save"
_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_MEMBERS = re.compile(
    rf"{_MODEL}|{_INPUTS}|data/(weights|constants)/[\w.-]+|byteorder|archive_format|archive_version|\.data/\w+"
)
_NAME = re.compile(r"[\w.+-]*")
_SIZES = (
    r"\b[su]\d+\b|'[su]\d+'|\b(?:Symbol|Integer|Add|Mul|Mod|FloorDiv|Max|Min|Eq|Ne|And|Or|Not)\b"
    r"|\b(?:positive|integer|nonnegative|True|False)\b|[\s\d+*/()<>=,-]"
)
_STRINGS = {
    "target": re.compile(
        r"torch\.ops\.(aten|prims)\.(?!from_file)\w+\.\w+"
        r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
        r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|ge|le|gt|lt|and_|or_|not_)"
    ),
    "expr_str": re.compile(rf"(?![\s\S]*\*\*)(?:{_SIZES})*"),
    "as_string": re.compile(r"[\w.,> -]*"),
    "in_spec": re.compile(r'(?!.*__enum__)[\w.\s{}\[\]":,\\]*', re.DOTALL),
}
_STRINGS["out_spec"] = _STRINGS["in_spec"]
_LEFT_OUT = {"metadata": {}, "guards_code": []}
"""Entries that are for people (stack traces), or that .module() would compile, and what takes their place."""


def build(weights: str | Path | None, config: Config) -> Compiled:
    """Load an exported program; export it in eval mode, with a dynamic first dimension (torch.export.Dim).

    Raises:
        UsageError: no file was named, it is no such file, or one that could run code.
    """
    copy = plain_copy(archive(weights, "export", _MAKE), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.load(copy).module()
        except Exception as error:  # of torch's reader, of a file whose fields don't fit together
            raise UsageError(f"{weights} can't be loaded: {in_one_line(error)}") from error
    return Compiled(program, config, weights)


def plain_copy(members: dict[str, bytes], path: str | Path) -> io.BytesIO:
    """An exported program's file of what is only data; UsageError where it needs more."""
    if _MODEL not in members:
        raise UsageError(f"{path} is no file of {_MAKE}: it holds no {_MODEL}")
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as made:
        for name, data in members.items():
            if not _MEMBERS.fullmatch(name):
                raise _beyond(path, "holds", name)
            if name.endswith(".json"):
                try:
                    data = json.dumps(_plain(json.loads(data), name, path)).encode()
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{path}: {name} is no JSON: {error}") from error
            made.writestr(f"program/{name}", data)
    try:  # without this, torch's reader would unpickle it freely
        torch.load(io.BytesIO(members[_INPUTS]), weights_only=True)
    except Exception as error:
        raise _beyond(path, "holds", f"other things than tensors in {_INPUTS}") from error
    copy.seek(0)
    return copy


def _plain(node: Any, key: str, path: str | Path) -> Any:
    """JSON with `_LEFT_OUT` left out, in which every string is of the form that its key has."""
    if isinstance(node, dict):
        return {
            _plain(name, "", path): _LEFT_OUT[name] if name in _LEFT_OUT else _plain(value, name, path)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [_plain(value, key, path) for value in node]
    if key == "use_pickle" and node is not False or isinstance(node, str) and not _fits(node, key):
        raise _beyond(path, f"has {key or 'the name'}", str(node))
    return node


def _fits(text: str, key: str) -> bool:
    return _STRINGS.get(key, _NAME).fullmatch(text) is not None


def _beyond(path: str | Path, has: str, what: str) -> UsageError:
    return UsageError(f"{path} {has} {what[:80]!r}, which could reach beyond its tensors: it is not loaded")
