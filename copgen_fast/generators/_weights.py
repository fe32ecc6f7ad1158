"""Where a generator's weights are, when they are not part of the package."""

from __future__ import annotations

import os
from pathlib import Path

from copgen_fast.errors import UsageError

VARIABLE = "COPGEN_WEIGHTS"


def find(name: str, weights: str | Path | None, file: str, source: str) -> Path:
    """The file (or folder) of generator `name`'s weights: the one given, else `file` in the folder $COPGEN_WEIGHTS.

    Raises:
        UsageError: there is none; the message says where it comes from and where to put it.
    """
    folder = os.environ.get(VARIABLE)
    path = Path(weights) if weights is not None else Path(folder) / file if folder else None
    if path is not None and path.exists():
        return path
    looked = "none was given" if path is None else f"{path} is not there"
    raise UsageError(
        f"generator {name} needs weights, and {looked}: get {source} and name it by --generator.weights FILE, "
        f"or put it as {file} into a folder and set {VARIABLE} to that folder; nothing is downloaded"
    )
