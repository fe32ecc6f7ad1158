"""One page of results: targets, plots and every row; the plots as PNG files too."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2

from bench.view import check, files, plots
from copgen_fast.errors import UsageError
from copgen_fast.runtime import artifacts

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")


def write(paths: tuple[Path, ...], folder: Path) -> list[Path]:
    """Write FOLDER/report.html, self-contained, and a PNG of each of its plots.

    Raises:
        UsageError: a file is missing or holds no results, or none holds a time.
    """
    rows = files.read_all(paths)
    if not rows:
        raise UsageError(f"no times in {', '.join(map(str, paths))}: nothing to draw")
    drawn = dict(pictures(rows))
    written = []
    for name, png in drawn.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.png"
        artifacts.write_bytes(path, png)
        written.append(path)
    template = jinja2.Template(_TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = template.render(
        sources=[_source(path) for path in files.of_results(paths)],
        findings=[found for found in check.findings(paths) if found.verdict != "not measured"],
        pictures={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in drawn.items()},
        tables=_tables(rows),
    )
    artifacts.write_bytes(folder / PAGE, page.encode())
    return [folder / PAGE, *written]


def pictures(rows: list[dict]) -> Iterator[tuple[str, bytes]]:
    """Names and plots of the rows: bars for each area and direction, curves over N, ablations."""
    for (device, area), some in _grouped(rows, ("device", "area")).items():
        for (direction,), those in _grouped(some, ("direction",)).items():
            parts = [row for row in those if plots.WITHOUT in row["case"]]
            whole = [row for row in those if plots.WITHOUT not in row["case"]]
            name = f"{area}, {direction}, {device}"
            if whole:
                yield name, plots.bars(plots.groups(whole), name)
            if parts:
                of = parts[0]["case"].partition(plots.WITHOUT)[0]
                yield f"{name}, ablation", plots.ablation(parts, f"{area}: {of}, {direction}, {device}")
            if area == "info_nce":
                for (precision,), one in _grouped(whole, ("precision",)).items():
                    if len({row["case"] for row in one}) > 1:
                        over = f"{name}, {precision}, over N"
                        yield over, plots.over_n(one, over)


def _grouped(rows: list[dict], columns: tuple[str, ...]) -> dict[tuple[str, ...], list[dict]]:
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def _source(path: Path) -> dict[str, str]:
    """The machine, versions and commit of one file, as text."""
    content = files.content(path)

    def text(part: str) -> str:
        return ", ".join(f"{name} {value}" for name, value in (content.get(part) or {}).items() if value is not None)

    commit = content.get("commit") or "unknown"
    return {"name": path.name, "machine": text("machine"), "versions": text("versions"), "commit": commit}


def _tables(rows: list[dict]) -> dict[str, list[dict]]:
    found = _grouped(rows, ("device", "area"))
    return {f"{area}, {device}": some for (device, area), some in found.items()}
