"""The charts of a report: curves of training and accuracies with their spread."""

from __future__ import annotations

from copgen_fast.stages.report import figures, table
from copgen_fast.stages.run import Run
from copgen_fast.training.metrics import Row


def charts_of(run: Run, logs: dict[str, list[Row]], results: table.Results) -> dict[str, bytes]:
    """Charts as PNG files, by title."""
    charts = {}
    navigator = logs["navigator"]
    if navigator:
        samples = [row["samples"] for row in navigator]

        def column(name: str) -> tuple[list[float], list[float]]:
            return samples, [row[name] for row in navigator]

        losses = {"estimator f": column("loss_estimator"), "navigator T_z": column("loss_navigator")}
        charts["navigator losses"] = figures.lines(losses, "samples", "loss")
        charts["displacement E||T_z(z)||"] = figures.lines(
            {"E||T_z(z)||": column("displacement_norm")}, "samples", "L2 norm", run.navigator.delta, "delta"
        )
        spread = {
            "std of T_z(z)": "displacement_std",
            "mean of T_z(z)": "displacement_mean",
            "std of z'": "positive_std",
        }
        spread["share common to all latents"] = "displacement_shared"
        charts["displacement statistics"] = figures.lines(
            {label: column(name) for label, name in spread.items()}, "samples", "value"
        )
    for stage in ("navigator", "steering"):
        rows = logs[stage]
        groups = [name for name in (rows[0] if rows else ()) if name.startswith("displacement_norm_")]
        if groups:
            samples = [row["samples"] for row in rows]
            by_group = {f"group {name.rpartition('_')[2]}": (samples, [row[name] for row in rows]) for name in groups}
            charts[f"{stage}: E||dz|| by latent group"] = figures.lines(by_group, "samples", "L2 norm")
    if rows := logs["steering"]:
        samples, names = [row["samples"] for row in rows], {"with walks": "loss", "without": "loss_without_walks"}
        losses = {label: (samples, [row[name] for row in rows]) for label, name in names.items()}
        charts["steering loss"] = figures.lines(losses, "samples", "masked L2")
    pretrain = {
        stage.partition(".")[2]: ([row["step"] for row in rows], [row["loss"] for row in rows])
        for stage, rows in logs.items()
        if stage.startswith("pretrain.")
    }
    charts["pretraining loss"] = figures.lines(pretrain, "step", "loss")
    for column in table.columns(results):
        if column.spread:
            charts[f"{column.title}, with its standard deviation"] = figures.bars(
                {name: row[column.name] for name, row in results.items() if column.name in row},
                {name: row[column.spread] for name, row in results.items() if column.name in row},
                column.title,
            )
    return charts
