"""Atomic reading and writing of a run folder's files: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from copgen_fast.errors import CopgenError, CorruptArtifactError, UsageError


@contextlib.contextmanager
def atomic(path: Path, by: str = "") -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Args:
        by: suffix of the temporary name, one for each process that may write the same path at the same time.

    Raises:
        CopgenError: the disk is full or not writable. The temporary file is deleted, and an older `path` is kept.
    """
    temporary = path.with_name(f".{path.name}{by}.incomplete")
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full or read-only disk into a CopgenError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UsageError(
                f"{path} can't be written ({error.strerror}): choose another --out, or make it writable"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise CopgenError(
            f"disk full while writing {path} ({free:.0f} MiB are free without it): no half-written file was left "
            "in place; make room and run the same command again"
        ) from error


@contextlib.contextmanager
def folder_lock(folder: Path, part: str = "") -> Iterator[None]:
    """Lock `folder` against other commands for the block; the system unlocks it when the process dies.

    Args:
        part: lock only this part of the folder: commands on other parts may run, those on the whole folder may not.

    Raises:
        UsageError: another command has locked it, or the folder is not writable.
    """
    wanted = [("", fcntl.LOCK_SH), (part, fcntl.LOCK_EX)] if part else [("", fcntl.LOCK_EX)]
    with contextlib.ExitStack() as held:
        for name, mode in wanted:
            path = folder / f".run{name}.lock"
            with explain_full_disk(path):
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "a+"))
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{folder} is in use by another command{f' for {name[1:]}' if name else ''}: wait for its end, or "
                    "choose another --out"
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
                    raise
        yield


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, by: str = "") -> None:
    """Write a file by `atomic`."""
    with atomic(path, by) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, by: str = "") -> None:
    """Write indented JSON by `atomic`."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode(), by)


def read_json(path: Path) -> Any:
    """Read JSON; raises CorruptArtifactError where it is not valid."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON ({error}): delete it to have it made again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    # As bytes: safetensors' own way to a file reports a full disk by an exception that is no OSError.
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CorruptArtifactError: it is truncated or not safetensors.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptArtifactError(f"{path} is truncated or no safetensors file ({error})") from error


def write_checkpoint(path: Path, state: dict) -> None:
    """Write nested state dicts of modules and optimisers, with torch.save."""
    buffer = io.BytesIO()  # torch.save, too, has its own exception for a full disk
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote, by torch.load(weights_only=True), which runs no pickled code.

    Raises:
        CorruptArtifactError: it is truncated or altered.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CorruptArtifactError(
            f"{path} is truncated, altered or holds more than tensors ({str(error).partition('. ')[0]}); "
            "a run's own checkpoint may be deleted: its stage then starts again"
        ) from error


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a state dict; any missing, unexpected or misshapen entry is an error that names it.

    Raises:
        CorruptArtifactError: the file does not hold this module.
    """
    own = module.state_dict()
    faults = [f"missing {name}" for name in own.keys() - tensors.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    faults += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        raise CorruptArtifactError(f"{path} does not fit {type(module).__name__}: {len(faults)} faults: {shown}")
    module.load_state_dict(tensors)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require(path: Path, stage: str) -> Path:
    """Return `path`, a file of `stage`.

    Raises:
        UsageError: it is missing; the message says which stage writes it.
    """
    if not path.exists():
        raise UsageError(f"{path} is missing: run `--stages {stage}` on this --out first")
    return path
