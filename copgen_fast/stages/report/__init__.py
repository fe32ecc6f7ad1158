"""One self-contained page per run: pictures first, then curves, results, speed and the exact configuration."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import jinja2
import torch
from torch import Tensor

from copgen_fast import generators, positives
from copgen_fast.images import pictures
from copgen_fast.positives.navigator import untrained
from copgen_fast.runtime import artifacts, latents
from copgen_fast.stages import Run
from copgen_fast.stages.report import figures
from copgen_fast.training.metrics import Row, read_rows

COLUMNS = 16
LEVELS = (0.5, 1.0, 1.5, 2.0)
"""Multiples of the learned displacement shown side by side."""


def run(run: Run) -> None:
    """Write report.html, metrics.json and metrics.jsonl into the run folder and print the table of results."""
    results, logs = read_results(run), read_logs(run)
    metrics = collect_metrics(run, results)
    artifacts.write_json(run.folder / "metrics.json", metrics)
    write_rows(run, logs)
    template = jinja2.Template((Path(__file__).parent / "report.html").read_text(), autoescape=True)
    page = template.render(
        title=run.folder.name,
        results=results,
        displacements={name: metrics.get(f"pairs.{name}.displacement_norm") for name in results},
        low_shots=run.config.probe.shots,
        pictures=make_pictures(run),
        charts={name: _embed(png) for name, png in make_charts(run, logs, results).items()},
        speeds=speeds(run, results),
        config=artifacts.read_json(run.folder / "config.json"),
        versions=artifacts.read_json(run.folder / "versions.json"),
    )
    artifacts.write_bytes(run.folder / "report.html", page.encode())
    print(table(results))
    print(f"report: {run.folder / 'report.html'}")


def read_results(run: Run) -> dict[str, dict[str, float]]:
    """Probe results by method, baselines first."""
    folder = run.folder / "probe"
    methods = (*run.config.probe.baselines, *run.methods)
    return {name: artifacts.read_json(artifacts.require(folder / f"{name}.json", "probe")) for name in methods}


def collect_metrics(run: Run, results: dict[str, dict[str, float]]) -> dict[str, float]:
    """All final numbers of the run by dotted name."""
    metrics: dict[str, float] = {}
    navigator = _summary(run.folder / "navigator")
    if navigator:
        metrics |= {f"navigator.{name}": value for name, value in navigator.items()}
        metrics["navigator.loss"] = navigator["loss_navigator"]
    pairs = {name: _summary(run.pairs_folder(name)) for name in run.config.pairs.positives}
    pairs = {name: summary for name, summary in pairs.items() if summary}
    for name, summary in pairs.items():
        metrics[f"pairs.{name}.displacement_norm"] = summary["displacement_mean"]
    if pairs:
        metrics["pairs.count"] = run.config.pairs.count
        metrics["pairs.images_per_s"] = _mean([summary["images_per_s"] for summary in pairs.values()])
    trained = {name: _summary(run.folder / "pretrain" / name) for name in run.methods}
    for name, summary in trained.items():
        metrics |= {f"pretrain.{name}.{key}": summary[key] for key in ("loss", "views_per_s", "seconds")}
    metrics["pretrain.views_per_s"] = _mean([summary["views_per_s"] for summary in trained.values()])
    for method, values in results.items():
        metrics |= {f"probe.{method}.{name}": value for name, value in values.items()}
    return metrics


def _summary(folder: Path) -> dict[str, float]:
    path = folder / "summary.json"
    return artifacts.read_json(path) if path.exists() else {}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def read_logs(run: Run) -> dict[str, list[Row]]:
    """Logs by stage, `navigator` and `pretrain.METHOD`; empty where a stage was not run."""
    folders = {"navigator": run.folder / "navigator"}
    folders |= {f"pretrain.{name}": run.folder / "pretrain" / name for name in run.methods}
    return {name: read_rows(folder / "metrics.jsonl") for name, folder in folders.items()}


def write_rows(run: Run, logs: dict[str, list[Row]]) -> None:
    """Join the logs of all stages, each row with the stage it comes from."""
    rows = [{"stage": stage, **row} for stage, rows in logs.items() for row in rows]
    artifacts.write_bytes(run.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def make_charts(run: Run, logs: dict[str, list[Row]], results: dict[str, dict[str, float]]) -> dict[str, bytes]:
    charts = {}
    navigator = logs["navigator"]
    if navigator:
        samples = [row["samples"] for row in navigator]

        def column(name: str) -> tuple[list[float], list[float]]:
            return samples, [row[name] for row in navigator]

        losses = {"estimator f": column("loss_estimator"), "navigator T": column("loss_navigator")}
        charts["navigator losses"] = figures.lines(losses, "samples", "loss")
        charts["displacement E||T(z)||"] = figures.lines(
            {"E||T(z)||": column("displacement_norm")}, "samples", "L2 norm", run.config.navigator.delta, "delta"
        )
        spread = {"std of T(z)": "displacement_std", "mean of T(z)": "displacement_mean", "std of z'": "positive_std"}
        spread["share common to all instances"] = "displacement_shared"
        charts["displacement statistics"] = figures.lines(
            {label: column(name) for label, name in spread.items()}, "samples", "value"
        )
    pretrain = {
        stage.partition(".")[2]: ([row["step"] for row in rows], [row["loss"] for row in rows])
        for stage, rows in logs.items()
        if stage != "navigator"
    }
    charts["pretraining loss"] = figures.lines(pretrain, "step", "NT-Xent")
    if all("lowshot_top1" in values for values in results.values()):
        charts["low-shot accuracy, with the standard deviation over draws"] = figures.bars(
            {name: values["lowshot_top1"] for name, values in results.items()},
            {name: values["lowshot_std"] for name, values in results.items()},
            "top-1, per cent",
        )
    return charts


@torch.inference_mode()
def make_pictures(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Sections of labelled strips of images: section -> [(label, data URI)]; none for a run on real images."""
    if run.config.pretrain.data == "real":
        return {}
    config = run.config
    exact = dataclasses.replace(config.generator, level="exact", checkpoint=False)
    G = generators.load(exact, torch.device("cpu"))
    seeds = range(config.pairs.start_seed, config.pairs.start_seed + COLUMNS)
    z = latents.sample_each(config.generator.prior, seeds, G.latent_dim)

    def draw(latent: Tensor) -> Tensor:
        """Images, of a conditional generator of classes from the first to the last."""
        classes = torch.arange(len(latent)) * G.classes // len(latent) if G.classes else None
        return G(latent, classes)

    def strip(label: str, latent: Tensor) -> tuple[str, str]:
        distance = (latent - z).norm(dim=1).mean().item()
        name = f"{label} ({distance:.2f})" if distance else label
        return name, _embed(pictures.grid_png(draw(latent), COLUMNS))

    setting = positives.Setting(G.latent_dim, config.seed, config.navigator, config.pairs, run.navigator_file)
    ways = [(name, positives.build(name, setting)(z, list(seeds))) for name in config.pairs.positives]
    compared = [strip("anchor", z)] + [strip(name, latent) for name, latent in ways if name != "navigator"]
    sections = {"Positives, one way a row (mean distance from the anchor's latent)": compared}
    learned = dict(ways).get("navigator")
    if learned is not None:
        compared += [strip(f"COP-Gen, {level:g} x T(z)", z + level * (learned - z)) for level in LEVELS]
        kept = sorted((run.folder / "navigator" / "kept").glob("*.safetensors"))
        T = untrained(G.latent_dim, config.navigator, config.seed)
        history = [strip("anchor", z)]
        for path in kept[:: max(1, len(kept) // 8)]:
            artifacts.load_strictly(T, artifacts.read_tensors(path), path)
            history.append(strip(f"after {int(path.stem)} samples", z + T(z)))
        sections["COP-Gen positives while the navigator learns"] = history
    more = latents.sample_each(config.generator.prior, range(2**31, 2**31 + 4 * COLUMNS), G.latent_dim)
    sections["Samples of the generator"] = [("", _embed(pictures.grid_png(draw(more), COLUMNS)))]
    return sections


def speeds(run: Run, results: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """What each stage took: (stage, throughput, seconds)."""
    rows = []
    navigator = _summary(run.folder / "navigator")
    if navigator:
        wait = f"{navigator['data_wait']:.1%} waiting for data"
        rows.append(("navigator", f"{navigator['samples_per_s']:.0f} samples/s, {wait}", navigator["seconds"]))
    for name in run.config.pairs.positives:
        if summary := _summary(run.pairs_folder(name)):
            rows.append((f"pairs {name}", f"{summary['images_per_s']:.0f} images/s", summary["seconds"]))
    for name in run.methods:
        summary = _summary(run.folder / "pretrain" / name)
        wait = f"{summary['data_wait']:.1%} waiting for data"
        rows.append((f"pretrain {name}", f"{summary['views_per_s']:.0f} views/s, {wait}", summary["seconds"]))
    return rows + [(f"probe {name}", "", values["seconds"]) for name, values in results.items()]


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as text for the terminal; accuracies in per cent."""
    columns = {"linear": "linear_top1", "low-shot": "lowshot_top1", "+-": "lowshot_std", "kNN": "knn_top1"}
    columns = {title: name for title, name in columns.items() if all(name in row for row in results.values())}
    lines = [f"{'method':22}" + "".join(f"{title:>10}" for title in columns)]
    for method, row in results.items():
        lines.append(f"{method:22}" + "".join(f"{100 * row[name]:10.1f}" for name in columns.values()))
    return "\n".join(lines)


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
