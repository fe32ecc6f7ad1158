"""Changes of our times between two files of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.view import files
from copgen_fast.errors import UsageError


def lines(before: Path, after: Path) -> Iterator[str]:
    """One line for each of our measurements, whatever its peers: both medians and their ratio.

    A `*` marks a change beyond the spread of both.

    Raises:
        UsageError: a file is missing or holds no results, or they share no row.
    """
    old, new = _measurements(before), _measurements(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise UsageError(f"{before} and {after} have no row in common: they differ in device or in area")
    yield f"{'':74} {'before ms':>10} {'after ms':>10} {'before/after':>12}"
    for key in shared:
        a, b = old[key], new[key]
        speedup = a["ours_ms"] / b["ours_ms"]
        beyond = max(speedup, 1 / speedup) > max(a["ours_spread"], b["ours_spread"])
        backends = "" if a["backend"] == b["backend"] else f" {a['backend']} -> {b['backend']}"
        text = f"{_text(key):74} {a['ours_ms']:10.4g} {b['ours_ms']:10.4g} {speedup:11.2f}x"
        yield f"{text}{' *' if beyond else ''}{backends}"
    for path, own, other in ((before, old, new), (after, new, old)):
        for key in own:
            if key not in other:
                yield f"{_text(key):74} only in {path}"


def _measurements(path: Path) -> dict[tuple[str, ...], dict]:
    return {key: rows[0] for key, rows in files.measurements(files.read(path)).items()}


def _text(key: tuple[str, ...]) -> str:
    area, case, _, precision, direction = key
    return f"{area} {case}, {precision}, {direction}"
