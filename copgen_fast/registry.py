"""A folder is a registry: every public module in it is an entry, named as its file (with - for _)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from copgen_fast.errors import UsageError


def names(package: str) -> list[str]:
    """Names of the entries of `package` (a dotted name such as "copgen_fast.generators"), sorted."""
    path = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def load(package: str, name: str) -> ModuleType:
    """Import entry `name` of `package`.

    Raises:
        UsageError: no such entry; the message lists those there are.
    """
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2]
        raise UsageError(f"unknown name {name!r} in {kind}: choose from {', '.join(known)}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")
