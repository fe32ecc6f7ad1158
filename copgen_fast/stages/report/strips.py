"""Strips of images for the report: positives beside their anchors, and the navigator while it learns."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from copgen_fast import generators, positives
from copgen_fast.encoders import Encoder
from copgen_fast.evals import detection
from copgen_fast.images import pictures
from copgen_fast.positives.navigator import untrained
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, latents
from copgen_fast.stages.probe import open_encoder
from copgen_fast.stages.report import steering
from copgen_fast.stages.run import Run

COLUMNS = 16
WALKED = 2
"""Latents from which walks are shown."""
LEVELS = (0.5, 1.0, 1.5, 2.0)
"""Multiples of the learned displacement shown side by side."""

Strips = dict[str, list[tuple[str, bytes]]]
"""Labelled PNG files by section."""


@torch.inference_mode()
def strips_of(run: Run) -> Strips:
    """Sections of labelled strips of images; none for a run on real images."""
    if run.config.pretrain.data == "real":
        return {}
    config = run.config
    exact = dataclasses.replace(config.generator, level="exact", checkpoint=False)
    G = generators.load(exact, torch.device("cpu"))
    seeds = range(config.pairs.start_seed, config.pairs.start_seed + COLUMNS)
    z = latents.each(G.sample, seeds)

    def draw(latent: Tensor) -> Tensor:
        """Images, of a conditional generator of classes from the first to the last."""
        classes = torch.arange(len(latent)) * G.classes // len(latent) if G.classes else None
        return G(latent, classes)

    def strip(name: str, latent: Tensor) -> tuple[str, bytes]:
        distance = (latent - z).norm(dim=1).mean().item()
        return f"{name} ({distance:.2f})" if distance else name, pictures.grid_png(draw(latent), COLUMNS)

    ways = {}
    for name, options in positives.options(config.pairs).items():
        ways[label(name)] = positives.build(name, run.setting(G, options))(z, list(seeds))
    compared = [strip("anchor", z)] + [strip(name, latent) for name, latent in ways.items() if name != "navigator"]
    sections = {"Positives, one way a row (mean distance from the anchor's latent)": compared}
    learned = ways.get("navigator")
    if learned is not None:
        compared += [strip(f"COP-Gen, {level:g} x T_z(z)", z + level * (learned - z)) for level in LEVELS]
        kept = sorted((run.folder / "navigator" / "kept").glob("*.safetensors"))
        T_z = untrained(G.latent_dim, run.navigator, config.seed, G.latent_groups, G.latent_shape)
        history = [strip("anchor", z)]
        for path in kept[:: max(1, len(kept) // 8)]:
            artifacts.load_strictly(T_z, artifacts.read_tensors(path), path)
            history.append(strip(f"after {int(path.stem)} samples", z + T_z(z)))
        sections["COP-Gen positives while the navigator learns"] = history
    if "steering" in ways:
        title = "Walks: transformed images above, G(z + alpha w) below, from one end of the range to the other"
        sections[title] = steering.strips_of(run, G, z[:WALKED])
    more = latents.each(G.sample, range(2**31, 2**31 + 4 * COLUMNS))
    sections["Samples of the generator"] = [("", pictures.grid_png(draw(more), COLUMNS))]
    return sections


def detections_of(run: Run) -> Strips:
    """A section with a picture of each encoder's detections, where it was evaluated by them."""
    if "detection" not in run.config.probe.evals:
        return {}
    pictures = []
    for source in (*run.config.probe.baselines, *run.sources):
        encoder = open_encoder(run, source)
        if isinstance(encoder, Encoder):
            path = detection.folder_of(encoder, run.folder) / detection.PICTURE
            pictures.append((label(source), artifacts.require(path, "probe").read_bytes()))
    return {"Detections in test images, in a colour a class (white: annotated)": pictures}
