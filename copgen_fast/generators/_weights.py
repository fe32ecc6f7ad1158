"""Finding and reading weights of generators that are not part of the package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import artifacts, weights

VARIABLE = "COPGEN_WEIGHTS"


def find(name: str, given: str | Path | None, file: str, source: str) -> Path:
    """The file (or folder) of generator `name`'s weights: the one given, else `file` in the folder $COPGEN_WEIGHTS.

    Raises:
        UsageError: there is none; the message says where it comes from and where to put it.
    """
    folder = os.environ.get(VARIABLE)
    path = Path(given) if given is not None else Path(folder).expanduser() / file if folder else None
    if path is not None and path.exists():
        return path
    looked = "none was given" if path is None else f"{path} is not there"
    raise UsageError(
        f"generator {name} needs weights, and {looked}: get {source} and name it by --generator.weights, "
        f"or put it as {file} into a folder and set {VARIABLE} to that folder; nothing is downloaded"
    )


@contextlib.contextmanager
def with_remedy(name: str, given: str | Path | None, remedy: str) -> Iterator[Path]:
    """The file of generator `name`'s weights; errors about it say `remedy`, where such a file comes from.

    Raises:
        UsageError: none was named; also in place of any CopgenError.
    """
    if given is None:
        raise UsageError(f"generator {name} needs its weights, which are not part of this package: {remedy}")
    try:
        yield Path(given)
    except CopgenError as error:
        raise UsageError(f"generator weights {error}: {remedy}") from error


def held(given: str | Path | None) -> str:
    """What the weights hold that a `build` failed with, in a few words that say what to do where they are at fault."""
    if given is None:
        return "it was given no weights (--generator.weights FILE)"
    if Path(given).is_dir():
        return f"{given} is a folder"
    try:
        tree = weights.read(Path(given)).tree
    except CopgenError as error:
        return str(error)
    return f"{given} holds {weights.describe(tree, weights.flatten(tree))}"


def load_into(module: nn.Module, name: str, given: str | Path | None, remedy: str) -> None:
    """Load a generator's tensors from a file of this or of other code, by `runtime.weights`.

    Raises:
        UsageError: none was named, or it is missing, no file of weights, or does not fit; the message says what it
            holds and ends with `remedy`.
    """
    with with_remedy(name, given, remedy) as path:
        artifacts.load_strictly(module, weights.load(path, module.state_dict().keys()), path)
