"""Linear transfer to several image sets, such as the seven of the paper's Table 2: one accuracy a set, and their mean.

The numbers are those of `python -m copgen_fast.evaluate --sets`, here for every encoder of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

from torch import nn

from copgen_fast import evals
from copgen_fast.config import RunConfig, Side
from copgen_fast.errors import UsageError
from copgen_fast.images.transfer_sets import rules
from copgen_fast.options import Place, check_ranges
from copgen_fast.runtime import artifacts

SETS = ("food101", "cifar10", "cifar100", "sun397", "oxfordiiitpet", "caltech101-background", "flowers102")
"""The paper's, in its order; VISSL's Caltech-101 is the one with a class of background."""
FOLDER = "transfer"


@dataclass(frozen=True)
class Config:
    """Options of transfer to several sets."""

    root: Place | None = None
    """Folder of all sets, each in torchvision's layout; None: --data.root."""
    sets: tuple[str, ...] = SETS
    """Names as --data.name has them."""
    protocol: Literal["vissl", "lbfgs"] = "vissl"
    """Evaluation of each set: VISSL's, as in the paper's Table 2, or logistic regression."""
    size: Side = 224
    """Pixels a side of the crops."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise ValueError("sets: expected at least one, and each once")


def number_of(name: str) -> str:
    """What the accuracy on a set is called: `transfer_food101_top1`."""
    return f"transfer_{name.replace('-', '_')}_top1"


def check_data(config: Config, run_config: RunConfig) -> None:
    """Check that every set is there, decoding only first images.

    Raises:
        UsageError: sets that are missing or not whole, all of them.
    """
    faults = []
    for name in config.sets:
        try:
            evals.expect_data(_on(name, config, run_config))
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("; ".join(faults))


def evaluate(encoder: nn.Module, config: Config, run: evals.EvalRun) -> dict[str, float]:
    """Evaluate on each set; the numbers are kept set by set in RUN/transfer, where a stopped run goes on.

    Returns:
        `transfer_SET_top1` of each set, by `lbfgs` the mean over classes where such tables show that, and
        `transfer_mean_top1`; `corrupt_images`, where some of all sets together can't be decoded and were left out.
        Nothing for raw pixels.

    Raises:
        UsageError, NonFiniteError, Interrupted: as the protocol.
    """
    if not isinstance(encoder, nn.Module) or not any(True for _ in encoder.parameters()):
        return {}
    frozen = evals.freeze(encoder, run)
    digest = artifacts.tensors_digest(encoder.state_dict())
    path = run.folder / FOLDER / f"{digest[:12]}.json"
    settings = {
        "protocol": config.protocol,
        "size": config.size,
        "seed": run.config.seed,
        "root": config.root or run.config.data.root,
        "digest": digest,
        "network": hashlib.sha256(repr(encoder).encode()).hexdigest(),  # weights don't tell its strides, say
        "mean": list(frozen.mean),
        "std": list(frozen.std),
        "precision": run.config.probe.precision,
    }
    found = artifacts.read_record(path) if path.exists() else {}
    if found.get("settings") != settings:
        found = {}
    known, corrupt = found.get("results", {}), found.get("corrupt_images", {})
    of_data = dict(frozen.correct)  # which images of --data were right: protocols note theirs under the same names
    for name in config.sets:
        if name not in known:
            on = dataclasses.replace(run, config=_on(name, config, run.config))
            numbers = evals.evaluate(config.protocol, encoder, on)
            per_class = config.protocol == "lbfgs" and rules(name).metric == "mean_per_class"
            known[name] = numbers[f"{config.protocol}_top1{'_per_class' if per_class else ''}"]
            corrupt[name] = evals.left_out(on)
            artifacts.write_record(path, {"settings": settings, "results": known, "corrupt_images": corrupt})
            frozen.forget()  # features of photographs of several sets needn't lie in memory together
    frozen.correct.clear()
    frozen.correct.update(of_data)
    values = [known[name] for name in config.sets]
    numbers = dict(zip(map(number_of, config.sets), values, strict=True))
    numbers["transfer_mean_top1"] = sum(values) / len(values)
    if left_out := sum(corrupt.get(name, 0) for name in config.sets):
        numbers["corrupt_images"] = left_out
    return numbers


def _on(name: str, config: Config, run_config: RunConfig) -> RunConfig:
    """The run's configuration for one set."""
    data = dataclasses.replace(run_config.data, name=name, root=config.root or run_config.data.root)
    options = (f"{config.protocol}.size={config.size}",)
    probe = dataclasses.replace(run_config.probe, evals=(config.protocol,), options=options)
    return dataclasses.replace(run_config, data=data, probe=probe)
