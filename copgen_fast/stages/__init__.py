"""The stages: navigator -> pairs -> pretrain -> probe -> report. Each reads only what the ones before wrote.

Each file has `run(run)`, where `run` is a `Run`: the configuration, the run folder and the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from copgen_fast.config import RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Run:
    """One run folder and what is to be computed in it."""

    config: RunConfig
    folder: Path
    device: torch.device
    ranks: Ranks = ALONE
    """This process among those that compute the run; rank 0 alone writes into the folder."""

    @property
    def generator_record(self) -> Path:
        """What the generator was made from (`generators.load`), recorded by the stages that run it."""
        return self.folder / "generator.json"

    @property
    def navigator_file(self) -> Path:
        """The trained T, made by the navigator stage."""
        return self.folder / "navigator" / "navigator.safetensors"

    def pairs_folder(self, positive: str) -> Path:
        """Shards of one way of making positives, made by the pairs stage."""
        return self.folder / "pairs" / positive

    def encoder_file(self, method: str) -> Path:
        """An encoder in torchvision's names, made by the pretrain stage."""
        return self.folder / "pretrain" / method / "encoder.safetensors"

    @property
    def methods(self) -> tuple[str, ...]:
        """What encoders are pretrained on: the ways of making positives, or real images."""
        return ("real",) if self.config.pretrain.data == "real" else self.config.pairs.positives

    def expect_classes(self, classes: int) -> None:
        """Raises UsageError where pretraining, to come, would need the classes that the generator does not have."""
        options = self.config.pretrain
        if "pretrain" in self.config.stages and (options.data, options.loss) == ("pairs", "supcon") and not classes:
            raise UsageError(
                f"pretrain.loss: supcon needs classes, and generator {self.config.generator.name} has none: take a "
                "class-conditional one, or --pretrain.data real"
            )
