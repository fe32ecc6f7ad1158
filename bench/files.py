"""Files of results as `python -m bench AREA --json FILE` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from copgen_fast.artifacts import read_json
from copgen_fast.errors import UsageError

# What tells one measurement from another; its rows differ in the peer only.
MEASUREMENT = ("area", "case", "device", "precision", "direction")


def read(path: Path) -> list[dict]:
    """The rows of one file, the fields of `harness.Row` each.

    Raises:
        UsageError: it is missing or holds no results.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing: `python -m bench AREA --json {path}` writes it")
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "ours_ms" in row for row in rows):
        raise UsageError(f"{path} holds no benchmark results")
    return rows


def read_all(paths: Iterable[Path]) -> list[dict]:
    """The rows of all files; where two compare the same with the same peer, the later one's."""
    found = {}
    for path in paths:
        for row in read(path):
            found[tuple(row[name] for name in (*MEASUREMENT, "peer"))] = row
    return list(found.values())
