"""Evaluate any encoder: python -m copgen_fast.evaluate ENCODER --evals linear knn --data.name NAME --data.root PATH.

ENCODER is a run's encoder.safetensors, or a checkpoint of other code, of which nothing is executed.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from copgen_fast import __version__, augmentations, evals, registry
from copgen_fast.config import DataConfig, Options, ProbeConfig, RunConfig
from copgen_fast.convert import load_encoder
from copgen_fast.convert.load_encoder import EncoderOptions, LoadedEncoder
from copgen_fast.errors import CopgenError, UsageError, command
from copgen_fast.images.transfer_sets import rules
from copgen_fast.options import Count, Range, Seed, parse
from copgen_fast.runtime import artifacts, devices, distributed
from copgen_fast.runtime.interrupts import handle_signals
from copgen_fast.stages import Run
from copgen_fast.stages.probe import measure, pairs_of
from copgen_fast.stages.report import table

COMMAND = "python -m copgen_fast.evaluate"
_SAME = ("encoder", "data", "evals", "options", "batch", "precision", "seed")
"""What results depend on, and so must be the same where a stopped command goes on."""
Mean = tuple[Annotated[float, Range(0, 1)], Annotated[float, Range(0, 1)], Annotated[float, Range(0, 1)]]
Std = tuple[Annotated[float, Range(1e-3, 10)], Annotated[float, Range(1e-3, 10)], Annotated[float, Range(1e-3, 10)]]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate an encoder on real labelled images, by the code of a run's probe stage; writes JSON, prints a table.

    Recognised are ResNets of this package's runs, torchvision, timm, VISSL, MoCo, SupContrast (and the reference code),
    lightly, solo-learn and detectron2, within DataParallel and torch.compile; other networks by --encoder.name.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """.safetensors, or what torch.save or pickle wrote."""
    evals: tuple[str, ...] = ("linear", "knn")
    """Evaluations (built in, a module or a file); `python -m copgen_fast.train --help` lists them."""
    options: Annotated[Options, tyro.conf.arg(name="evals.options", prefix_name=False)] = ()
    """Their options, as NAME.field=value."""
    data: DataConfig = field(default_factory=DataConfig)
    sets: tuple[str, ...] = ()
    """Several data sets, all in torchvision's layouts in --data.root, instead of --data.name: a row each, and a row of
    all for each evaluation. The same command goes on where it was stopped."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    mean: Mean | None = None
    """Mean that images in [0, 1] were normalised by in training; None: of the run's policy, else ImageNet's."""
    std: Std | None = None
    """Standard deviation, likewise."""
    out: Path | None = None
    """File for the results; None: beside ENCODER, as encoder.DATA.json, encoder.sets.json or encoder.detection.json."""
    overwrite: bool = False
    """Replace an existing file of results."""
    batch: Count = 256
    """Images encoded at once."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the encoder."""
    seed: Seed = 0
    """Fixes everything random in an evaluation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True, eq=False)
class Evaluation(Run):
    """What evaluations see of a run, for an encoder from anywhere."""

    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def evaluation(options: EvaluateConfig, loaded: LoadedEncoder, device: torch.device) -> Evaluation:
    """The run that the encoder is evaluated in: that which made it, where there is one, with this command's options."""
    config = loaded.run or RunConfig()
    probe = ProbeConfig(options.evals, options.options, baselines=(), batch=options.batch, precision=options.precision)
    config = dataclasses.replace(config, seed=options.seed, data=options.data, probe=probe)
    policy = augmentations.get(config.pretrain.augmentation)
    normalization = (options.mean or policy.mean, options.std or policy.std)
    folder = options.file.absolute().parents[3] if loaded.run else options.file.absolute().parent
    return Evaluation(config, folder, device, normalization=normalization)


def results_file(options: EvaluateConfig) -> Path:
    """Where the results go.

    Raises:
        UsageError: something is there already and is not to be replaced, or the folder is not writable.
    """
    own = all(map(evals.has_own_data, options.evals))
    name = "sets" if options.sets else "-".join(map(registry.label, options.evals)) if own else options.data.name
    out = options.out or options.file.with_name(f"{options.file.stem}.{name}.json")
    if out.is_dir() or (out.exists() and not (options.overwrite or options.sets)):
        raise UsageError(f"{out} exists: give --overwrite to replace it, or another --out")
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UsageError(f"{existing} is not writable: choose where the results go with --out")
    return out


def expect_features(encoder: torch.nn.Module, run: Evaluation) -> None:
    """Check that the network takes images of this size, by two grey ones.

    Raises:
        UsageError: it does not.
    """
    size = run.config.data.image_size
    try:
        found = evals.freeze(encoder, run).features(torch.full((2, 3, size, size), 128, dtype=torch.uint8))
    except CopgenError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the encoder takes no images of {size} pixels ({reason}): see --data.image-size") from error
    print(f"features [N, {found.shape[1]}] of images [N, 3, {size}, {size}] on {run.device}", flush=True)


def record(loaded: LoadedEncoder, run: Evaluation, results: dict[str, float]) -> dict[str, Any]:
    """What is written: the results, and all that they depend on."""
    mean, std = run.normalization
    probe, data = run.config.probe, dataclasses.asdict(run.config.data)
    return {
        "results": results,
        "split_sha256": evals.split_digest(run),
        "encoder": loaded.record | {"mean": list(mean), "std": list(std)},
        "data": data,
        "evals": list(probe.evals),
        "options": list(probe.options),
        "batch": probe.batch,
        "precision": probe.precision,
        "seed": run.config.seed,
        "device": str(run.device),
        "copgen_fast": __version__,
        "torch": torch.__version__,
    }


def measure_sets(options: EvaluateConfig, loaded: LoadedEncoder, device: torch.device, out: Path) -> table.Results:
    """Numbers of each of the `--sets`, written as they come; those that `out` has already are not computed again.

    Raises:
        UsageError: a set is missing or not whole, told before any is evaluated; `out` is of other options.
    """
    each = {name: dataclasses.replace(options.data, name=name) for name in options.sets}
    runs = {name: evaluation(dataclasses.replace(options, data=data), loaded, device) for name, data in each.items()}
    faults = []
    for run in runs.values():
        try:
            evals.expect_data(run.config)
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("; ".join(faults))
    results, digests = {}, {}
    if out.exists() and not options.overwrite:
        found = artifacts.read_record(out, needed=("results", "split_sha256"))
        results, digests = found["results"], found["split_sha256"]
        expected = record(loaded, runs[options.sets[0]], results)
        expected["data"].pop("name")
        if any(found.get(name) != expected[name] for name in _SAME):
            raise UsageError(f"{out} is of another encoder or other options: give --overwrite, or another --out")
    expect_features(loaded.module, runs[options.sets[0]])
    for name, run in runs.items():
        if name not in results:
            results[name] = measure(loaded.module, run, f"evaluate on {name}")
            digests[name] = evals.split_digest(run)
            written = record(loaded, run, results) | {"split_sha256": digests}
            written["data"].pop("name")
            artifacts.write_record(out, written)
            evals.freeze(loaded.module, run).forget()
    return {name: results[name] for name in options.sets}


def set_tables(options: EvaluateConfig, results: table.Results) -> str:
    """All numbers, a row for each set; then each evaluation's row of all sets, as the tables of papers have it."""
    tables = [table.text(results)]
    for name in options.evals:
        prefix, row = registry.label(name).replace("-", "_"), {}
        for data, numbers in results.items():
            metric = "top1_per_class" if name == "lbfgs" and rules(data).metric == "mean_per_class" else "top1"
            if f"{prefix}_{metric}" in numbers:
                row[f"{data}_{metric}"] = numbers[f"{prefix}_{metric}"]
        if row:
            tables.append(table.text({f"{options.file.stem}, {registry.label(name)}": row}))
    return "\n\n".join(tables)


@command
def main(arguments: list[str] | None = None) -> int:
    """Evaluate one encoder; returns the exit code: 0, 2 for a fault of usage, 130 when stopped, else 1."""
    options = parse(EvaluateConfig, arguments, COMMAND)
    if not options.evals:
        raise UsageError("--evals: expected at least one")
    if distributed.world_size() > 1 and (options.sets or not all(map(evals.is_shared, options.evals))):
        raise UsageError("several processes share --evals detection alone: evaluate the rest by one, without torchrun")
    out = results_file(options)
    device = devices.resolve(distributed.local_device(options.device), options.precision)
    devices.make_current(device)
    with handle_signals(), devices.full_float32(), distributed.joined(device, RunConfig.timeout) as ranks:
        loaded = load_encoder.load(options.file, options.encoder)
        if ranks.first:
            print(loaded.summary, flush=True)
        run = dataclasses.replace(evaluation(options, loaded, device), ranks=ranks)
        evals.freeze(loaded.module, run, loaded.run and pairs_of(run, options.file.absolute().parents[1].name))
        if options.sets:
            print(set_tables(options, measure_sets(options, loaded, device, out)))
        else:
            evals.expect_data(run.config)
            if ranks.first:
                expect_features(loaded.module, run)
            results = measure(loaded.module, run, "evaluate", ranks)
            if not ranks.first:
                return 0
            artifacts.write_record(out, record(loaded, run, results))
            print(table.text({options.file.stem: results}))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    distributed.leave(main())
