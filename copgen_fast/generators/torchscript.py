"""A generator from a TorchScript file (.pt of torch.jit.save): --generator.name torchscript --generator.weights FILE.

TorchScript runs in an interpreter of its own: no Python of the file is run and nothing in it is unpickled. Its few
operations that read or write files are refused.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from copgen_fast.errors import UsageError, in_one_line
from copgen_fast.generators._compiled import Compiled, Config, archive

__all__ = ["Config", "build"]

_MAKE = "torch.jit.save"
_OUTSIDE = r"\b(save|from_file|load|open)\s*\(|torch\.classes|\b_?c10d\b|\brpc\b"


def build(weights: str | Path | None, config: Config) -> Compiled:
    """Load a scripted or traced module, as it was saved (save it in eval mode).

    Raises:
        UsageError: no file was named, it is no TorchScript, or its code reads or writes files.
    """
    members = archive(weights, "torchscript", _MAKE)
    code = {name: data.decode(errors="replace") for name, data in members.items() if name.startswith("code/")}
    if "constants.pkl" not in members or not code:
        raise UsageError(f"{weights} is no TorchScript: make one by torch.jit.trace or torch.jit.script and {_MAKE}")
    for name, text in code.items():
        if name.endswith(".py") and (found := re.search(_OUTSIDE, text)):
            what = "which reaches beyond its tensors: it is not loaded"
            raise UsageError(f"{weights}: {name} has {found[0]!r}, {what}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.export is to replace it
        try:
            program = torch.jit.load(str(weights), map_location="cpu")
        except RuntimeError as error:
            raise UsageError(f"{weights} can't be loaded: {in_one_line(error)}") from error
    return Compiled(program, config, weights)
