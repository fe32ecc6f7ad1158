"""What `python -m bench AREA` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """How to measure."""

    json: Path | None = None
    """File for the results."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the first GPU where there is one."""

    threads: int | None = None
    """Threads of PyTorch on the CPU; None leaves its own choice."""

    repeats: int = 30
    """Samples of each measurement; slow calls get fewer: 5, whole training steps 3."""

    min_seconds: float = 0.005
    """A sample repeats a call until it lasts about this long."""

    only: str = ""
    """Measure only the cases whose text contains this, such as "B=64 128px"."""

    ablate: bool = False
    """augment, generator: also time them with one part or trick left out at a time; alone with `--only without`."""

    profile: Path | None = None
    """navigator, pretrain: measure nothing; leave a Chrome trace of each case in this folder and print where its
    time goes."""
