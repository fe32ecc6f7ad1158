"""How far a run's positives may go: python -m copgen_fast.study calibrate RUN [--anchors N] [--distances D ...]."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from copgen_fast import generators
from copgen_fast.config import faults
from copgen_fast.errors import UsageError
from copgen_fast.options import parse
from copgen_fast.record import expect_current, expect_valid, from_identity
from copgen_fast.runtime import artifacts, devices
from copgen_fast.runtime.interrupts import handle_signals
from copgen_fast.stages import Run
from copgen_fast.stages._calibration import (
    Calibration,
    by_group,
    calibrate,
    displacements,
    draw_anchors,
    identity_encoder,
)

COMMAND = "python -m copgen_fast.study calibrate"
FILE = "calibration.json"


@dataclass(frozen=True)
class CalibrateConfig(Calibration):
    """Propose how far the positives of a run may go, without labels; leaves a table and curves in RUN/calibration.

    An encoder pretrained on identity pairs tells at each distance how often anchor and positive are in the same of k
    clusters, how often the anchor is found among unrelated images, and the rank of their distance (0: nearest).
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Path()
    """Run folder; what its ways of making positives need (T_z, walks) must be there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    """Calibrate a run; prints the table, and leaves calibration.json and calibration.png in RUN/calibration."""
    options = parse(CalibrateConfig, arguments, COMMAND)
    run = open_run(options.run, options.device)
    devices.make_current(run.device)
    with handle_signals(), devices.full_float32(), artifacts.folder_lock(run.folder):
        G = generators.load(run.config.generator, run.device)
        z = draw_anchors(run, G, options.anchors)
        moves = displacements(run, G, z)
        if options.groups and len(G.latent_groups) > 1:
            moves |= by_group(moves, G.latent_groups)
        found = calibrate(run, _plain(options), G, identity_encoder(run), z, moves)
        artifacts.write_record(run.calibration_folder / FILE, found)
        artifacts.write_bytes(run.calibration_folder / "calibration.png", picture(found))
    print("\n".join(table(found)))
    print(f"curves in {run.calibration_folder}")
    return 0


def open_run(folder: Path, device: str) -> Run:
    """A finished or unfinished run by its folder.

    Raises:
        UsageError: it is none.
        CorruptArtifactError: its record is altered.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no run folder, it has no config.json: give the --out of a run")
    record = artifacts.read_json(path)
    expect_valid(record, path)
    expect_current(record, folder)
    config = from_identity(record)
    for fault in faults(config):
        raise UsageError(f"{path}: {fault}")
    return Run(config, folder, devices.resolve(device, config.precision))


def _plain(options: CalibrateConfig) -> Calibration:
    return Calibration(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Calibration)})


def table(found: dict[str, Any]) -> Iterator[str]:
    """Lines of text: the reference, the curve of every way, the proposals."""
    clusters, reference = list(found["reference"]["agreement"]), found["reference"]
    head = "".join(f"{f'k={k}':>9}" for k in clusters)
    yield f"{found['anchors']} anchors, encoder {found['encoder']}; how often pairs are in the same of k clusters"
    for name, way in found["ways"].items():
        yield f"\n{name} (in this run E||dz|| {way['distance']:.3g})"
        yield f"{'E||dz||':>10}{head}{'retrieval@1':>13}{'rank':>8}"
        yield _row("two views", reference)
        yield _row("unrelated", found["chance"])
        for point in way["curve"]:
            yield _row(f"{point['distance']:.3g}", point)
    yield "\nproposed, the largest distance that keeps this part of two views' agreement: " + f"{found['keep']:g}"
    width = max(map(len, found["ways"]))
    for name, way in found["ways"].items():
        low, high = way["interval"]
        note = f"  {way['note']}" if way["note"] else ""
        yield f"{name:{width}}  {way['proposal']:.3g}  (95 % {low:.3g} to {high:.3g}){note}"


def _row(first: str, point: dict[str, Any]) -> str:
    rates = "".join(f"{rate:9.3f}" for rate in point["agreement"].values())
    return f"{first:>10}{rates}{point['retrieval_top1']:13.3f}{point['rank']:8.4f}"


def picture(found: dict[str, Any]) -> bytes:
    """Curves of all ways over E||dz||: agreement in clusters, each number of clusters a panel, and retrieval."""
    from matplotlib.figure import Figure

    clusters, reference = list(found["reference"]["agreement"]), found["reference"]
    panels = [(f"same of {k} clusters", lambda point, k=k: point["agreement"][k]) for k in clusters]
    panels.append(("anchor found among unrelated", lambda point: point["retrieval_top1"]))
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, way) in enumerate(found["ways"].items()):
            x, y = [point["distance"] for point in way["curve"]], [value(point) for point in way["curve"]]
            axes.plot([0, *x], [1, *y], label=name, color=f"C{number % 10}", marker=".", linewidth=1.4)
            axes.axvline(way["proposal"], color=f"C{number % 10}", linestyle=":", linewidth=1)
        axes.axhline(value(reference), color="#57606a", linestyle="--", linewidth=1, label="two views of one image")
        axes.set(title=title, xlabel="E||dz||", ylim=(0, 1.03))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
