"""One self-contained page per run: pictures first, then curves, results, speed and the exact configuration."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.stages.pretrain import collapse_warning, has_collapsed
from copgen_fast.stages.report import steering, table
from copgen_fast.stages.report.charts import charts_of
from copgen_fast.stages.report.explorer import explore
from copgen_fast.stages.report.scene import open_scene
from copgen_fast.stages.report.strips import detections_of, strips_of
from copgen_fast.stages.run import Run
from copgen_fast.training.metrics import Row, read_rows

LIMIT = 3_000_000
"""Bytes that a page is to stay below."""
_WORDS = 200_000  # of them for everything that is no picture
_SHEETS = 1_500_000  # of pictures that the sliders choose from, at most


def run(run: Run) -> None:
    """Write report.html, metrics.json and metrics.jsonl into the run folder and print the table of results."""
    results, logs = read_results(run), read_logs(run)
    metrics = collect_metrics(run, results)
    artifacts.write_json(run.folder / "metrics.json", metrics)
    write_rows(run, logs)
    scene = None if run.config.pretrain.data == "real" else open_scene(run)
    sections = (strips_of(run, scene) if scene else {}) | detections_of(run)
    pictures = {section: [(name, embed(data)) for name, data in strips] for section, strips in sections.items()}
    charts = {name: embed(png) for name, png in charts_of(run, logs, results).items()}
    taken = sum(map(len, charts.values())) + sum(len(uri) for strips in pictures.values() for _, uri in strips)
    budget = min(_SHEETS, (LIMIT - _WORDS - taken) * 3 // 4)  # Base64 takes four bytes for three
    columns = table.columns(results)
    folder = Path(__file__).parent
    template = jinja2.Template((folder / "report.html").read_text("utf-8"), autoescape=True)
    page = template.render(
        title=run.folder.name,
        results=results,
        columns=columns,
        main=table.main(columns, [label(name) for name in run.config.probe.evals]),
        tables=tables(run),
        displacements={name: metrics.get(f"pairs.{name}.displacement_norm") for name in results},
        explorer=explore(run, scene, budget) if scene else None,
        embed=embed,
        script=(folder / "explorer.js").read_text("utf-8"),
        pictures=pictures,
        charts=charts,
        speeds=speeds(run, results),
        warnings=warnings(run),
        config=artifacts.read_record(run.folder / "config.json"),
        versions=artifacts.read_record(run.folder / "versions.json", dict[str, str]),
    )
    artifacts.write_bytes(run.folder / "report.html", page.encode())
    print(table.text(results))
    print(f"report: {run.folder / 'report.html'}")


def read_results(run: Run) -> table.Results:
    """Numbers of the evaluations by source, baselines first."""
    sources = (*run.config.probe.baselines, *run.sources)
    paths = {label(name): artifacts.require(run.probe_file(name), "probe") for name in sources}
    return {name: artifacts.read_record(path, dict[str, float], ("seconds",)) for name, path in paths.items()}


def collect_metrics(run: Run, results: table.Results) -> dict[str, float]:
    """All final numbers of the run by dotted name."""
    metrics: dict[str, float] = {}
    navigator = _summary("navigator", run.folder / "navigator")
    if navigator:
        metrics |= {f"navigator.{name}": value for name, value in navigator.items()}
        metrics["navigator.loss"] = navigator["loss_navigator"]
    if "steering" in run.sources:
        walks = steering.read_walks(run)
        for walk, row in walks.items():
            numbers = {name: value for name, value in row.items() if name != "energy"}
            metrics |= {f"steering.{walk}.{name}": value for name, value in numbers.items()}
    pairs = {name: summary for name, summary in _pairs(run).items() if summary}
    for name, summary in pairs.items():
        metrics[f"pairs.{name}.displacement_norm"] = summary["displacement_mean"]
        groups = {key: value for key, value in summary.items() if key.startswith("displacement_norm_")}
        metrics |= {f"pairs.{name}.{key}": value for key, value in groups.items()}
    if pairs:
        metrics["pairs.count"] = run.config.pairs.count
    if rates := [summary["images_per_s"] for summary in pairs.values() if "images_per_s" in summary]:
        metrics["pairs.images_per_s"] = _mean(rates)
    trained = {label(name): _summary("pretrain", run.pretrain_folder(name)) for name in run.sources}
    for name, summary in trained.items():
        metrics |= {f"pretrain.{name}.{key}": summary[key] for key in ("loss", "views_per_s", "seconds")}
    metrics["pretrain.views_per_s"] = _mean([summary["views_per_s"] for summary in trained.values()])
    for source, values in results.items():
        metrics |= {f"probe.{source}.{name}": value for name, value in values.items()}
    return metrics


def tables(run: Run) -> dict[str, list[list[str]]]:
    """Further tables by title, rows of text with the headings first."""
    found = {}
    groups = {n: [v for k, v in row.items() if k.startswith("displacement_norm_")] for n, row in _pairs(run).items()}
    if any(groups.values()):
        heading = ["pairs", *(f"group {i}" for i in range(max(map(len, groups.values()))))]
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in groups.items()]
        found["Mean distance of z' from z in each latent group"] = [heading, *rows]
    if "steering" in run.sources:
        found["Walks: masked L2 to the transformed images, with and without them"] = steering.table_of(run)
    return found


_TRAINED = ("seconds", "samples_per_s", "data_wait")
_NEEDED = {
    "navigator": (*_TRAINED, "loss_navigator"),
    "steering": _TRAINED,
    "pairs": ("seconds", "images_per_s", "displacement_mean"),
    "pretrain": (*_TRAINED, "views_per_s", "loss"),
}
"""By stage, the numbers that its summary.json must have."""


def _pairs(run: Run) -> dict[str, dict[str, float]]:
    """By way of making positives, the summary that tells of its pairs: pretraining's own where that drew them."""
    if run.config.pretrain.data == "online":
        return {label(name): _summary("pretrain", run.pretrain_folder(name)) for name in run.sources}
    return {label(name): _summary("pairs", run.pairs_folder(name)) for name in run.config.pairs.positives}


def _summary(stage: str, folder: Path) -> dict[str, float]:
    """A stage's summary.json; empty where that was not run."""
    path = folder / "summary.json"
    if stage == "pretrain":
        artifacts.require(path, stage)
    hint = dict[str, float | dict[str, Any]] if stage == "steering" else dict[str, float]
    return artifacts.read_record(path, hint, _NEEDED[stage]) if path.exists() else {}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def read_logs(run: Run) -> dict[str, list[Row]]:
    """Logs by stage: `navigator`, `steering` and `pretrain.SOURCE`; empty where a stage was not run."""
    folders = {name: run.folder / name for name in ("navigator", "steering")}
    folders |= {f"pretrain.{label(name)}": run.pretrain_folder(name) for name in run.sources}
    return {name: read_rows(folder / "metrics.jsonl") for name, folder in folders.items()}


def write_rows(run: Run, logs: dict[str, list[Row]]) -> None:
    """Join the logs of all stages, each row with the stage it comes from."""
    rows = [{"stage": stage, **row} for stage, rows in logs.items() for row in rows]
    artifacts.write_bytes(run.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def speeds(run: Run, results: table.Results) -> list[tuple[str, str, float]]:
    """Throughput and seconds of every stage: (stage, throughput, seconds)."""
    rows = []
    for stage in ("navigator", "steering"):
        if summary := _summary(stage, run.folder / stage):
            wait = f"{summary['data_wait']:.1%} waiting for data"
            rows.append((stage, f"{summary['samples_per_s']:.0f} samples/s, {wait}", summary["seconds"]))
    for name in run.config.pairs.positives:
        if summary := _summary("pairs", run.pairs_folder(name)):
            rows.append((f"pairs {label(name)}", f"{summary['images_per_s']:.0f} images/s", summary["seconds"]))
    for name in run.sources:
        summary = _summary("pretrain", run.pretrain_folder(name))
        wait = f"{summary['data_wait']:.1%} waiting for data"
        rows.append((f"pretrain {label(name)}", f"{summary['views_per_s']:.0f} views/s, {wait}", summary["seconds"]))
    return rows + [(f"probe {name}", "", values["seconds"]) for name, values in results.items()]


def warnings(run: Run) -> list[str]:
    """Lines on encoders whose embeddings had collapsed when their pretraining ended."""
    rows = {label(name): _summary("pretrain", run.pretrain_folder(name)) for name in run.sources}
    return [f"{name}: {collapse_warning(row)}" for name, row in rows.items() if has_collapsed(row)]


def embed(data: bytes) -> str:
    """A PNG or JPEG file as a data URI."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
