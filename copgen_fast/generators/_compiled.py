"""What generators from TorchScript and torch.export files share: their options, and reading without running Python."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from copgen_fast import files
from copgen_fast.errors import UsageError
from copgen_fast.options import Count, CountOrZero


@dataclass(frozen=True)
class Config:
    """Options of a compiled generator, which a file of tensors and operations does not say."""

    latent: tuple[Count, ...] = ()
    """Shape of a latent, as 120 or 64,1,1; (): found by trying."""
    range: Literal["undeclared", "symmetric", "unit"] = "undeclared"
    """Range of its images: symmetric is [-1, 1], unit is [0, 1]; undeclared: [-1, 1] where values below 0 show it."""
    image: str = ""
    """Key or index of the images, of a dict or tuple with several."""
    classes: CountOrZero = 0
    """Number of classes; its forward is then forward(z, labels)."""
    groups: tuple[Count, ...] = ()
    """Sizes of latent groups."""


class Compiled(nn.Module):
    """A loaded program as a module that declares what its options say. The file's digest is among its buffers."""

    def __init__(self, program: nn.Module, config: Config, file: str | Path) -> None:
        super().__init__()
        self.program = program
        digest = np.frombuffer(bytes.fromhex(files.sha256(file)), np.uint8).copy()
        self.register_buffer("file_sha256", torch.from_numpy(digest))  # what is in it beside tensors counts, too
        self.classes, self.latent_groups = config.classes, config.groups
        if config.latent:
            self.latent_shape = config.latent
        if config.range != "undeclared":
            self.image_range = (-1, 1) if config.range == "symmetric" else (0, 1)
        if config.image:
            self.image_key = int(config.image) if config.image.isdecimal() else config.image

    def train(self, mode: bool = True) -> Compiled:
        """Left as it was saved: exported programs have no modes."""
        self.training = mode
        return self

    def forward(self, *inputs: Tensor) -> object:
        """What the program returns."""
        return self.program(*inputs)


def archive(path: str | Path | None, name: str, make: str) -> dict[str, bytes]:
    """The members of a program's zip file by their paths below its top folder, each once.

    Raises:
        UsageError: no file was named, or it is no such file.
    """
    if path is None:
        raise UsageError(f"generator {name} needs a program: give its file, made by {make}, by --generator.weights")
    files.expect_file(path)
    try:
        with zipfile.ZipFile(path) as opened:
            names = [info.filename for info in opened.infolist() if not info.is_dir()]
            if len(set(names)) < len(names):
                raise UsageError(f"{path} holds a member twice: make it again by {make}")
            return {member.partition("/")[2]: opened.read(member) for member in names}
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{path} is no file made by {make}: {error}") from error
