"""Judge frozen encoders on real labelled images."""

from __future__ import annotations

import time

import torch
from torch import nn
from tqdm import tqdm

from copgen_fast import augmentations, evals
from copgen_fast.encoders import Encoder
from copgen_fast.images import sets
from copgen_fast.runtime import artifacts, seeds
from copgen_fast.stages import Run


def run(run: Run) -> None:
    """Run every evaluation on every method and baseline; leaves RUN/probe/METHOD.json."""
    config = run.config
    for method in run.methods:
        artifacts.require(run.encoder_file(method), "pretrain")
    images = sets.load(config.data)
    policy = augmentations.get(config.pretrain.augmentation)
    for method in (*config.probe.baselines, *run.methods):
        path = run.folder / "probe" / f"{method}.json"
        if path.exists():
            continue
        started = time.perf_counter()
        encoder = open_encoder(run, method).to(run.device).eval().requires_grad_(False)
        subject = evals.Subject(encoder, policy.mean, policy.std, run.device)
        results = {}
        for name in tqdm(config.probe.evals, desc=f"probe {method}", unit=" evals"):
            results |= evals.run(name, subject, images, config.probe, config.seed)
        results["seconds"] = time.perf_counter() - started
        artifacts.write_json(path, results)


def open_encoder(run: Run, method: str) -> nn.Module:
    """The frozen encoder of a method, or a baseline: `random` (an encoder as initialised) or `pixels`.

    Raises:
        CorruptArtifactError: a weight is missing or unexpected.
    """
    if method == "pixels":
        return nn.Flatten()
    with seeds.seeded(run.config.seed, "encoder"):
        encoder = Encoder(run.config.pretrain.encoder)
    if method != "random":
        path = run.encoder_file(method)
        artifacts.load_strictly(encoder, artifacts.read_tensors(path), path)
    return encoder.to(memory_format=torch.channels_last)
