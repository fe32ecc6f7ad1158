"""A study's page: one HTML file with its table, charts, pictures, per-seed numbers and how to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch

from copgen_fast.errors import CopgenError
from copgen_fast.images import pictures
from copgen_fast.pairs.format import INDEX
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.stages.report import embed
from copgen_fast.statistics.summary import Summary
from copgen_fast.studies import _charts, _settings, _tables
from copgen_fast.training.metrics import Row, read_rows

PAIRS = 12
"""Pairs of each way of making positives that are shown."""
_LARGEST = 64  # pixels a side of an image that is shown
_PICTURES = 1_200_000  # bytes of all of them, so that the page stays below 3 MB
_POINTS = 200  # of a curve

Run = Mapping[str, Any]


def write(results: Mapping[str, Any], summary: Summary, folder: Path) -> None:
    """Write study.html, which needs no other file and no network.

    Args:
        results: of results.json.
        summary: of these.
        folder: the study's, in which its runs lie.
    """
    runs = [run for run in results["runs"] if run["state"] == "done"]
    column = _tables.columns_of(summary)[summary.metric]
    template = jinja2.Template((Path(__file__).parent / "study.html").read_text("utf-8"), autoescape=True)
    page = template.render(
        title=summary.title or folder.absolute().name,
        summary=summary,
        done=len(runs),
        count=len(results["runs"]),
        tables=_tables.tables(summary),
        holds_zero=_tables.HOLDS_ZERO,
        charts=list(_charts_of(summary, column, curves_of(folder, runs))),
        strips=strips_of(folder, runs, summary),
        pairs=PAIRS,
        values=_values(summary),
        commands=_commands(results["study"], summary),
        versions=_versions(folder, runs),
        embed=embed,
    )
    artifacts.write_bytes(folder / "study.html", page.encode())


def _charts_of(summary: Summary, column: Any, logs: dict[str, list[list[Row]]]) -> Iterator[tuple[str, str, bytes]]:
    """Charts as titles, descriptions and PNG files."""
    shown = [arm for arm in summary.arms if summary.metric in arm.numbers]
    if shown:
        means = ", ".join(f"{arm.name} {_tables.value_text(arm, summary.metric, column)}" for arm in shown)
        yield (
            f"{column.title} by seed",
            f"Values by seed, means and paired differences: {means}",
            _charts.dots(summary, column),
        )
    if (picture := _charts.against_distance(summary, column)) is not None:
        yield (
            f"{column.title} against E||dz||",
            f"{column.title} against the mean distance of positives, which the table lists",
            picture,
        )
    names = list(logs)
    for start in range(0, len(names), _charts.LINES):
        part = {name: logs[name] for name in names[start : start + _charts.LINES]}
        title = "Pretraining loss, mean and standard deviation over seeds"
        yield title, f"Pretraining loss against the step for {', '.join(part)}", _charts.curves(part)


def curves_of(folder: Path, runs: list[Run]) -> dict[str, list[list[Row]]]:
    """Rows of pretraining's log by arm, a list a seed, thinned out; arms whose folders lack it are left out."""
    logs: dict[str, list[list[Row]]] = {}
    for run in runs:
        for path in sorted((folder / run["folder"] / "pretrain" / label(run["source"])).glob("*/metrics.jsonl")):
            rows = read_rows(path)
            if rows and "loss" in rows[0]:
                logs.setdefault(run["arm"], []).append(rows[:: max(1, len(rows) // _POINTS)])
    return logs


def strips_of(folder: Path, runs: list[Run], summary: Summary) -> list[tuple[str, bytes]]:
    """Pictures of the first pairs, anchors above positives, of each different folder of pairs, with its arms' names."""
    arms: dict[Path, list[str]] = {}
    for run in runs:
        pairs = folder / run["folder"] / "pairs" / label(run["source"])
        if run["seed"] == summary.seeds[0] and (pairs / INDEX).exists():
            arms.setdefault(pairs.resolve(), []).append(run["arm"])
    found, left = [], _PICTURES
    for path, names in arms.items():
        if (picture := _strip(path)) is None or len(picture) > left:
            continue
        left -= len(picture)
        found.append((", ".join(names), picture))
    return found


def _strip(folder: Path) -> bytes | None:
    """A picture of a folder's first pairs; None where its shards are not readable any more."""
    try:
        pairs = PairDataset(folder, check=False)
        members = [pairs[index][:2] for index in range(min(PAIRS, len(pairs)))]
    except CopgenError:
        return None
    anchors = torch.stack([anchor for anchor, _ in members])
    positives = torch.stack([positive.reshape(-1, *anchor.shape)[0] for anchor, positive in members])
    images = torch.cat([anchors, positives]).float() / 127.5 - 1
    side = max(images.shape[2:])
    if side > _LARGEST:
        size = tuple(round(length * _LARGEST / side) for length in images.shape[2:])
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return pictures.smallest(pictures.grid(images, len(members)))


def _values(summary: Summary) -> list[tuple[str, str, list[str]]]:
    """Arm, number and its text for each seed, of the numbers of the table."""
    columns, rows = _tables.columns_of(summary), []
    for arm in summary.arms:
        for name in dict.fromkeys((*summary.shown, *arm.numbers)):
            if name in arm.numbers:
                column = columns.get(name) or _tables.column_of(name)
                known = arm.numbers[name].values
                cells = [_tables.number_text(known[seed], column) if seed in known else "" for seed in summary.seeds]
                rows.append((arm.name, column.title, cells))
    return rows


def _commands(study: Mapping[str, Any], summary: Summary) -> list[str]:
    """The command of each arm's first run."""
    found = []
    for arm in summary.arms:
        if not arm.reference:
            settings = {**study.get("settings", {}), **arm.settings, "seed": str(summary.seeds[0])}
            words = _settings.words(summary.preset, _settings.applicable(summary.preset, settings))
            found.append(shlex.join(["python", "-m", "copgen_fast.train", *words]))
    return found


def _versions(folder: Path, runs: list[Run]) -> dict[str, str]:
    """Versions of what the first finished run used."""
    for run in runs:
        path = folder / run["folder"] / "versions.json"
        if path.exists():
            return artifacts.read_record(path, dict[str, str])
    return {}
