"""Evaluate frozen encoders on real labelled images."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from copgen_fast import evals
from copgen_fast.encoders import Encoder
from copgen_fast.pairs.format import INDEX, read_index
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.runtime.progress import progress
from copgen_fast.stages.run import Run


def run(run: Run) -> None:
    """Run every evaluation on every source's encoder and every baseline; leaves RUN/probe/SOURCE.json.

    Beside it lies SOURCE.images.safetensors, which test images each evaluation got right, where one tells.

    Rank 0 computes all of them, other ranks those that processes share.
    """
    trained = () if run.config.probe.baselines_only else run.sources
    for source in trained:
        artifacts.require(run.encoder_file(source), "pretrain")
    if run.ranks.first:
        tell_other_size(run)
    sources = (*run.config.probe.baselines, *trained)
    wanted = [source for source in sources if not run.probe_file(source).exists()]
    run.ranks.barrier("the start of the probe", while_alive=True)
    for source in wanted:
        encoder = open_encoder(run, source)
        frozen = evals.freeze(encoder, run, pairs_of(run, source))
        results = measure(encoder, run, f"probe {label(source)}", run.ranks)
        if run.ranks.first:
            if frozen.correct:  # before the numbers, which say that all is there
                artifacts.write_tensors(run.images_file(source), frozen.correct, source=label(source))
            artifacts.write_record(run.probe_file(source), results)
        evals.release(encoder)
        run.ranks.barrier(f"the end of {label(source)}'s evaluations", while_alive=True)


def measure(encoder: nn.Module, run: evals.EvalRun, title: str, ranks: Ranks = ALONE) -> dict[str, float]:
    """Numbers of every evaluation of a run for one encoder, and the seconds that they took; on rank 0 all of them."""
    started = time.perf_counter()
    results: dict[str, float] = {}
    names = run.config.probe.evals
    with progress(len(names), title, "evaluations", disable=not ranks.first) as bar:
        for name in names:
            if evals.is_shared(name):
                ranks.barrier(f"evaluation {label(name)} of {title}", while_alive=True)
            if ranks.first or evals.is_shared(name):
                results |= evals.evaluate(name, encoder, run)
            bar.update(1)
    # Those of --data, and of evaluations that read other images and tell how many of them they left out.
    if count := evals.left_out(run) + results.get("corrupt_images", 0):
        results["corrupt_images"] = count
    return results | {"seconds": time.perf_counter() - started}


def pairs_of(run: Run, source: str) -> Path | None:
    """Folder of the pairs that a source's encoder was pretrained on; for a baseline, those of the first source."""
    if run.config.pretrain.data != "pairs":
        return None
    return run.pairs_folder(run.sources[0] if source in run.config.probe.baselines else source)


def tell_other_size(run: Run) -> None:
    """Print a line where images are evaluated at another size than that of the pairs pretrained on."""
    size = run.config.data.image_size
    for source in run.sources if run.config.pretrain.data == "pairs" else ():
        folder = run.pairs_folder(source)
        if not (folder / INDEX).exists():  # pairs may be deleted once they were trained on
            continue
        height, width = read_index(folder).image_shape[1:]
        if (height, width) != (size, size):
            print(
                f"probe: images of {size} x {size} pixels, and the encoders were pretrained on pairs of {height} x "
                f"{width}: --data.image-size {height} evaluates them at that size",
                flush=True,
            )
            return


def open_encoder(run: Run, source: str) -> nn.Module:
    """The encoder of a source, or a baseline: `random` (an encoder as initialised) or `pixels`.

    Raises:
        CorruptArtifactError: a weight is missing or unexpected.
    """
    if source == "pixels":
        return nn.Flatten()
    with seeds.seeded(run.config.seed, "encoder"):
        encoder = Encoder(run.config.pretrain.encoder)
    if source != "random":
        path = run.encoder_file(source)
        artifacts.load_strictly(encoder, artifacts.read_tensors(path, **run.encoder_of(source)), path)
    return encoder.to(memory_format=torch.channels_last)
