"""Opening of files that a user names or that a run reads back: regular files alone, and errors of one line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from copgen_fast.errors import UsageError


def expect_file(path: str | Path) -> Path:
    """`path`, checked to be a regular file: a pipe or a device may never end.

    Raises:
        UsageError: it is missing or something else.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UsageError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}: expected a regular file")
    return Path(path)


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises:
        UsageError: it is missing, something else, or can't be read.
    """
    try:
        with open(expect_file(path), "rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror or error})") from error


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; UsageError as for `open_file`."""
    with open_file(path) as file:
        return file.read()


def sha256(path: str | Path) -> str:
    """SHA-256 of a regular file, in hex; UsageError as for `open_file`."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's content, or of the names and contents of a folder's own files but hidden ones.

    The same wherever it lies.

    Raises:
        UsageError: it is missing, or something else, or a file can't be read.
    """
    if not Path(path).is_dir():
        return sha256(path)
    paths = sorted(item for item in Path(path).iterdir() if item.is_file() and not item.name.startswith("."))
    return hashlib.sha256("\n".join(f"{sha256(item)} {item.name}" for item in paths).encode()).hexdigest()
