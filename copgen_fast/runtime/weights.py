"""The one reader of weights in files of other code: it finds the wanted tensors, or says what the file holds instead.

Tensors may lie in dictionaries in a dictionary ({"g_ema": ...}, {"state_dict": ...}), in a pickled module, and under
prefixes of wrapping modules; what lies beside them is left out, and nothing of the file is run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.files import read_bytes
from copgen_fast.runtime import artifacts, unpickle
from copgen_fast.runtime.unpickle import Content, Shell, Stored

Tensors = dict[str, Any]
"""`Stored` or Tensor by name."""

WRAPPERS = {"module", "_orig_mod"}
"""Parts of a name that come from DataParallel and torch.compile."""
_AVERAGED = re.compile(r"(^|[._])(g_?)?(ema|shadow|averaged?)([._]|$)", re.IGNORECASE)
_DEEPEST, _MOST_ITEMS = 8, 64

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a pointer of git-lfs and not the file itself: run `git lfs pull` in its folder"),
    (b"<!doctype html", "is a web page and not the file: download what the page links to"),
    (b"<html", "is a web page and not the file: download what the page links to"),
    (b"<?xml", "is an XML text, as servers send in place of a file: download it again"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\x89hdf", "is an HDF5 file, as Keras writes: save the weights with torch.save or as safetensors"),
)


def read(path: Path) -> Content:
    """The content of a safetensors file, of one of torch.save, or of a pickle of arrays, by what the file begins with.

    Raises:
        UsageError: it is missing, no regular file, or something else than weights; the message says what.
        CorruptArtifactError: it is truncated or altered.
        CopgenError: see `unpickle.load`.
    """
    data = read_bytes(path)
    if not data:
        raise UsageError(f"{path} is empty: get it again")
    start = data[:64].lstrip().lower()
    for begins, what in _NOT_WEIGHTS:
        if start.startswith(begins):
            raise UsageError(f"{path} {what}")
    header = int.from_bytes(data[:8], "little")
    if Path(path).suffix == ".safetensors" or (data[8:9] == b"{" and header < len(data)):
        return Content(artifacts.decode_tensors(data, path)[0])
    return unpickle.load(path, data)


def flatten(tree: Any, wrappers: Collection[str] = WRAPPERS) -> Tensors:
    """All tensors of a checkpoint by dotted names, without the parts that come from wrapping modules.

    Raises:
        UsageError: two names become one.
    """
    found: Tensors = {}
    full: dict[str, str] = {}
    seen: set[int] = set()

    def add(name: str, value: Any) -> None:
        bare = ".".join(part for part in name.split(".") if part not in wrappers)
        if bare in found:
            raise UsageError(f"{full[bare]} and {name} are two tensors for one name, {bare}")
        found[bare], full[bare] = value, name

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, (Stored, Tensor)):
            add(".".join(path), value)
            return
        if len(path) > _DEEPEST or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Shell) and value.state.keys() & {"_modules", "_parameters"}:
            for name, item in unpickle.state_dict(value).items():
                add(".".join((*path, name)), item)
            return
        items = value.state if isinstance(value, Shell) else value
        if isinstance(items, (list, tuple)):
            items = dict(enumerate(items[:_MOST_ITEMS]))
        if isinstance(items, dict):
            for name, item in items.items():
                if isinstance(name, (str, int)):
                    walk(item, (*path, str(name)))

    walk(tree, ())
    return found


def describe(tree: Any, tensors: Tensors) -> str:
    """What a file holds, in some words."""
    if tensors:
        shown = [f"{name} {list(value.shape)}" for name, value in list(tensors.items())[:3]]
        return f"{len(tensors)} tensors: {', '.join(shown)}{', ...' if len(tensors) > 3 else ''}"
    kind = f"an object of class {tree.of}" if isinstance(tree, Shell) else f"a {type(tree).__name__}"
    names = [str(name) for name in list(tree)[:4]] if isinstance(tree, dict) else []
    return f"{kind} without tensors" + (f" ({', '.join(names)})" if names else "")


def load(path: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a module with these names, found in a file at any place and under any prefix.

    Of several places the averaged weights (`g_ema`) are taken. Where tensors are left out, that is printed. Names that
    are missing or too many beside those found are left to `artifacts.load_strictly`.

    Raises:
        UsageError: none of them is there, or several places have them; the message says what the file holds.
        CorruptArtifactError, CopgenError: see `read`.
    """
    return select(read(path).tree, wanted, path)[1]


def select(tree: Any, wanted: Collection[str], path: Path) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the tensors that `load` returns, and these, from the tree of a file that has been read."""
    tensors = flatten(tree)
    anchors = sorted(wanted, key=len)[-8:]
    prefixes = {name.removesuffix(anchor) for anchor in anchors for name in tensors if name.endswith(anchor)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    found = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in prefixes}
    best = [prefix for prefix in sorted(found) if found[prefix] == max(found.values())]
    if len(best) > 1:
        best = [prefix for prefix in best if _AVERAGED.search(prefix)] or best
    if len(best) != 1:
        expected = f"expected {len(wanted)} tensors: {', '.join(sorted(wanted)[:3])}, ..."
        where = f", at several places ({', '.join(best[:4])}): save one of them alone" if best else ""
        raise UsageError(f"{path} holds {describe(tree, tensors)}{where}; {expected}")
    (prefix,) = best
    names = [name for name in tensors if name.startswith(prefix)]
    try:
        taken = {name.removeprefix(prefix): tensor(tensors[name]) for name in names}
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{path}: {error}") from error
    if beside := len(tensors) - len(names):
        print(f"{path}: tensors under {prefix!r} are taken, {beside} others left out", flush=True)
    return prefix, taken


def tensor(value: Stored | Tensor) -> Tensor:
    """A tensor of `flatten`, read; CorruptArtifactError where its bytes are damaged."""
    return value.read() if isinstance(value, Stored) else value
