"""Pictures for the report that stand still: samples, walks and detections."""

from __future__ import annotations

import io

from PIL import Image

from copgen_fast.encoders import Encoder
from copgen_fast.evals import detection
from copgen_fast.images import pictures
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, latents
from copgen_fast.stages.probe import open_encoder
from copgen_fast.stages.report import steering
from copgen_fast.stages.report.scene import COLUMNS, Scene
from copgen_fast.stages.run import Run

SAMPLES = 64
WALKED = 2
"""Latents from which walks are shown."""
_DETECTIONS = 500_000  # bytes of all pictures of detections

Strips = dict[str, list[tuple[str, bytes]]]
"""Labelled pictures by section."""


def strips_of(run: Run, scene: Scene) -> Strips:
    """Sections of pictures of generated images."""
    sections: Strips = {}
    if "steering" in run.sources:
        title = "Walks: transformed images above, G(z + alpha w) below, from one end of the range to the other"
        sections[title] = steering.strips_of(run, scene, scene.z[:WALKED])
    z = latents.each(scene.G.sample, range(2**31, 2**31 + SAMPLES))
    samples = pictures.grid(scene.images(z, scene.classes(SAMPLES)), COLUMNS)
    return sections | {"Samples of the generator": [("", pictures.smallest(samples, scene.quality))]}


def detections_of(run: Run) -> Strips:
    """A section with a picture of each encoder's detections, where it was evaluated by them."""
    if "detection" not in run.config.probe.evals:
        return {}
    found = {}
    for source in (*run.config.probe.baselines, *run.sources):
        encoder = open_encoder(run, source)
        if isinstance(encoder, Encoder):
            path = detection.folder_of(encoder, run.folder) / detection.PICTURE
            found[label(source)] = artifacts.require(path, "probe").read_bytes()
    limit = _DETECTIONS // len(found)
    shown = [(name, pictures.smallest(Image.open(io.BytesIO(png)), limit=limit)) for name, png in found.items()]
    return {"Detections in test images, in a colour a class (white: annotated)": shown}
