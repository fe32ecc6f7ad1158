"""The steering stage on the report: a table of what each walk does, and pictures of walks beside their targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from copgen_fast.images import pictures
from copgen_fast.positives import _warps
from copgen_fast.positives.steering import learned
from copgen_fast.runtime import artifacts
from copgen_fast.stages._draws import draw_labels
from copgen_fast.stages.report.scene import Scene
from copgen_fast.stages.run import Run

STEPS = 7
"""Step sizes shown, from one end of a transformation's range to the other."""


def read_walks(run: Run) -> dict[str, dict[str, Any]]:
    """What the steering stage measured of every transformation."""
    path = artifacts.require(run.folder / "steering" / "summary.json", "steering")
    return artifacts.read_record(path, dict[str, float | dict[str, Any]], ("transformations",))["transformations"]


def table_of(run: Run) -> list[list[str]]:
    """Rows of text, headings first: of each transformation, and of all at once."""
    found = read_walks(run)
    groups = len(next(iter(found.values()))["energy"])
    shares = [f"energy in group {i} %" for i in range(groups)] if groups > 1 else []
    rows = [["transformation", "loss", "loss without the walk", "ratio", "norm of w", "E||dz||", *shares]]
    for name, row in found.items():
        numbers = [f"{row['loss']:.4f}", f"{row['loss_without']:.4f}", f"{row['ratio']:.2f}"]
        numbers += [f"{row['norm']:.2f}" if "norm" in row else "", f"{row['displacement_norm']:.2f}"]
        numbers += [f"{100 * share:.0f}" for share in row.get("energy", [])] if groups > 1 else []
        rows.append([name, *numbers])
    return rows


def strips_of(run: Run, scene: Scene, z: Tensor) -> list[tuple[str, bytes]]:
    """A picture for every walk, a latent of z [N, L] after another: targets above, G(z + alpha w) below them."""
    limits = _warps.limits_of(run.config.steering)
    walks = learned(scene.G.latent_dim, run.config.steering, run.steering_file)
    shown = z.repeat_interleave(STEPS, dim=0)
    labels = draw_labels(scene.G, len(z), z.device, run.config.seed, "walks shown")
    labels = None if labels is None else labels.repeat_interleave(STEPS)
    x = scene.images(shown, labels)
    strips = []
    for name, limit in limits.items():
        amount = _warps.between(name, limit, STEPS)[:, None].repeat(len(z), 1)
        one = {name: limit}
        inverse = _warps.homographies(amount, one, x.shape[2:]).to(x.dtype)
        target, _ = _warps.transform(x, inverse, _warps.colours(amount, one).to(x.dtype))
        with torch.inference_mode():
            dz = walks(_warps.steps(amount, one).to(z.dtype), (name,))
        grid = pictures.grid(torch.cat([target, scene.images(shown + dz, labels)]), columns=len(shown))
        strips.append((name, pictures.smallest(grid, scene.quality)))
    return strips
