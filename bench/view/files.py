"""Files of results as `python -m bench AREA --json FILE` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from copgen_fast.errors import UsageError
from copgen_fast.runtime.artifacts import read_json

_MEASUREMENT = ("area", "case", "device", "precision", "direction")


def read(path: Path) -> list[dict]:
    """The rows of one file that hold times, the fields of `rows.Row` each; tables of kernels have none.

    Raises:
        UsageError: it is missing or holds no results.
    """
    return [row for row in content(path)["rows"] if "ours_ms" in row]


def of_results(paths: Iterable[Path]) -> list[Path]:
    """All paths but those of tests (.xml)."""
    return [path for path in paths if path.suffix != ".xml"]


def content(path: Path) -> dict:
    """The whole file: `rows`, and where they were measured."""
    if not path.is_file():
        raise UsageError(f"{path} is missing: `python -m bench AREA --json {path}` writes it")
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} holds no benchmark results")
    return found


def read_all(paths: Iterable[Path]) -> list[dict]:
    """The rows of all files but tests' (.xml); the later one's where two compare the same with the same peer."""
    found = {}
    for path in of_results(paths):
        for row in read(path):
            found[(*(row[name] for name in _MEASUREMENT), row.get("backend"), row["peer"])] = row
    return list(found.values())


def measurements(rows: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """Rows by our measurement: area, case, device, precision, direction; rows of one differ in the peer only.

    Where there are several backends, the case ends in the backend.
    """
    backends: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        backends.setdefault(tuple(row[name] for name in _MEASUREMENT), set()).add(row["backend"])
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in _MEASUREMENT)
        if len(backends[key]) > 1:
            key = (key[0], f"{key[1]}, {row['backend']}", *key[2:])
        found.setdefault(key, []).append(row)
    return found
