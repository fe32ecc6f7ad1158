"""A run: its configuration, its folder and where each stage leaves its files in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from copgen_fast import positives
from copgen_fast.config import NavigatorConfig, RunConfig
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.methods import needs_labels
from copgen_fast.registry import label
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.distributed import ALONE, Ranks

IMAGES = ".images.safetensors"
"""Ends the name of the file that lies beside probe/SOURCE.json."""


@dataclass(frozen=True)
class Delta:
    """navigator/delta.json."""

    delta: float
    calibration: dict[str, Any]
    """What it was found by."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder and what is to be computed in it."""

    config: RunConfig
    folder: Path
    device: torch.device
    ranks: Ranks = ALONE
    """This process among those that compute the run; rank 0 alone writes into the folder."""
    checked: set[str] = field(default_factory=set)
    """Sources of which this process has written every shard, so that none need be compared with its digest."""

    @property
    def sources(self) -> tuple[str, ...]:
        """What encoders are pretrained on: the ways of making positives, or `real` images."""
        return ("real",) if self.config.pretrain.data == "real" else self.config.pairs.positives

    @property
    def generator_record(self) -> Path:
        """What the generator was made from (`generators.load`), recorded by the stages that run it."""
        return self.folder / "generator.json"

    @property
    def navigator_file(self) -> Path:
        """The trained T_z, made by the navigator stage."""
        return self.folder / "navigator" / "navigator.safetensors"

    @property
    def delta_file(self) -> Path:
        """The delta that `--navigator.delta auto` stands for, found by the navigator stage."""
        return self.folder / "navigator" / "delta.json"

    @property
    def calibration_folder(self) -> Path:
        """How far positives may go, and the encoder that tells, where no other of the run does."""
        return self.folder / "calibration"

    @property
    def navigator(self) -> NavigatorConfig:
        """The navigator's configuration, with the delta that was found where it is `auto`, if it was.

        Raises:
            CorruptArtifactError: its record is altered.
        """
        config = self.config.navigator
        if config.delta != "auto" or not self.delta_file.exists():
            return config
        return dataclasses.replace(config, delta=artifacts.read_record(self.delta_file, Delta).delta)

    @property
    def steering_file(self) -> Path:
        """The walks of positives `steering`, made by the steering stage."""
        return self.folder / "steering" / "steering.safetensors"

    def setting(self, G: nn.Module, options: Any) -> positives.Setting:
        """What a way of making positives is built from, with its own `options`."""
        config = self.config
        return positives.Setting(
            latent_dim=G.latent_dim,
            seed=config.seed,
            navigator=self.navigator,
            navigator_file=self.navigator_file,
            options=options,
            latent_groups=G.latent_groups,
            latent_shape=getattr(G, "latent_shape", ()),
            sample=getattr(G, "sample", None),
            steering=config.steering,
            steering_file=self.steering_file,
        )

    def pairs_folder(self, source: str) -> Path:
        """Shards of one way of making positives, made by the pairs stage."""
        return self.folder / "pairs" / label(source)

    def pretrain_folder(self, source: str) -> Path:
        """Log, checkpoint and encoder of one source and the run's method, made by the pretrain stage."""
        return self.folder / "pretrain" / label(source) / label(self.config.method.name)

    def encoder_file(self, source: str) -> Path:
        """A pretrained encoder in torchvision's names."""
        return self.pretrain_folder(source) / "encoder.safetensors"

    def encoder_of(self, source: str) -> dict[str, str]:
        """What is recorded in an encoder's file, so that no file is taken for another's."""
        return {"source": label(source), "method": label(self.config.method.name)}

    def probe_file(self, source: str) -> Path:
        """Numbers of every evaluation of a source's encoder or of a baseline, made by the probe stage."""
        return self.folder / "probe" / f"{label(source)}.json"

    def images_file(self, source: str) -> Path:
        """Which test images each evaluation of a source or baseline got right, made by the probe stage."""
        return self.probe_file(source).with_suffix(IMAGES)

    def expect_folder(self) -> None:
        """Raises CopgenError where the folder, which has recorded the run, was deleted or moved meanwhile."""
        if not (self.folder / "config.json").exists():
            raise CopgenError(
                f"{self.folder} was deleted or moved while the run wrote into it: delete what is left of it, or move "
                "it back, and run the same command again"
            )

    def expect_classes(self, classes: int) -> None:
        """Raises UsageError where pretraining, to come, would need more classes than those of the generator's pairs."""
        method, pairs = self.config.method.name, self.config.pairs
        if "pretrain" not in self.config.stages or self.config.pretrain.data == "real" or not needs_labels(method):
            return
        if not classes:
            raise UsageError(
                f"--method {method} needs classes, and generator {self.config.generator.name} has none: take a "
                "class-conditional one, or --pretrain.data real"
            )
        expect_comparable(method, min(classes, -(-pairs.count // pairs.samples_per_class)), pairs.count)


def expect_comparable(method: str, classes: int, samples: int) -> None:
    """Raises UsageError where a supervised loss has nothing to compare: one class, or a class for every sample."""
    remedy = "see --pairs.samples-per-class and --pairs.count, or take another method"
    if classes < 2:
        raise UsageError(f"--method {method}: all {samples} samples have one class, so none is a negative: {remedy}")
    if classes >= samples:
        raise UsageError(f"--method {method}: no two samples share a class, so none is a positive: {remedy}")
