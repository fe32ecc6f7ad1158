"""Finding and reading weights of generators that are not part of the package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import artifacts

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
        f"generator {name} needs weights, and {looked}: get {source} and name it by --generator.weights, "
        f"or put it as {file} into a folder and set {VARIABLE} to that folder; nothing is downloaded"
    )


@contextlib.contextmanager
def with_remedy(name: str, weights: str | Path | None, remedy: str) -> Iterator[Path]:
    """The file of generator `name`'s weights; errors about it say `remedy`, where such a file comes from.

    Raises:
        UsageError: none was named, or it is missing; also in place of any CopgenError.
    """
    if weights is None:
        raise UsageError(f"generator {name} needs its weights, which are not part of this package: {remedy}")
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"generator weights {path} are missing: {remedy}")
    try:
        yield path
    except CopgenError as error:
        raise UsageError(f"{error}: {remedy}") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """A plain state dict, .safetensors or a torch.save of tensors, read without running pickled code.

    Raises:
        CopgenError: the file is truncated, or holds something else than named tensors.
    """
    tensors = artifacts.read_tensors(path) if path.suffix == ".safetensors" else artifacts.read_checkpoint(path)
    if not isinstance(tensors, dict) or not tensors:
        raise UsageError(f"{path} is no state dict, but {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise UsageError(f"{path} is no plain state dict: {name!r} is no name")
        if not isinstance(value, Tensor):
            raise UsageError(f"{path} is no plain state dict: {name!r} is {type(value).__name__}, not a tensor")
    return tensors
