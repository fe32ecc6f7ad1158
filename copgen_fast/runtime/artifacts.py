"""Atomic reading and writing of a run folder's files: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from copgen_fast import schema
from copgen_fast.errors import CopgenError, CorruptArtifactError, InUseError, UsageError
from copgen_fast.files import expect_file, read_bytes
from copgen_fast.runtime import unpickle

_REMEDY = "delete it to have it made again"
_DIGEST = "record_sha256"
"""Field of JSON records that holds the digest of the others."""
_RECORD = "copgen_fast"
"""Name of the one entry in the metadata of safetensors files."""

_UNWRITABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)


@contextlib.contextmanager
def atomic(path: Path, by: str = "") -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Args:
        by: suffix of the temporary name, one for each process that may write the same path at the same time.

    Raises:
        CopgenError: the disk is full or not writable. The temporary file is deleted, and an older `path` is kept.
    """
    temporary = path.with_name(f".{path.name}{by}.incomplete")
    with explain_disk(path):
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
def explain_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, or of a path that can't be written, into a CopgenError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _UNWRITABLE:
            reason = "it is no folder" if error.errno == errno.EEXIST else error.strerror
            raise UsageError(
                f"{path} can't be written ({reason}): choose another place, or make this one writable"
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
        InUseError: another command has locked it.
        UsageError: the folder is not writable.
    """
    wanted = [("", fcntl.LOCK_SH), (part, fcntl.LOCK_EX)] if part else [("", fcntl.LOCK_EX)]
    with contextlib.ExitStack() as held:
        for name, mode in wanted:
            path = folder / f".run{name}.lock"
            with explain_disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "a+"))
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InUseError(
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
        return schema.parse(read_bytes(path))
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON ({error}): {_REMEDY}") from error


def write_record(path: Path, values: dict[str, Any], by: str = "") -> None:
    """Write a JSON object and, in it, its digest, which `read_record` compares."""
    write_json(path, values | {_DIGEST: _json_digest(values)}, by)


def read_record(path: Path, hint: Any = dict[str, Any], needed: Iterable[str] = (), remedy: str = "") -> Any:
    """Read a JSON object that `write_record` wrote; the value is what `schema.check` makes of it.

    Args:
        hint: its type.
        needed: fields that it must have, where `hint` says none.
        remedy: for the message.

    Raises:
        CorruptArtifactError: it is no such object, or altered; the message names the file and the field.
    """
    remedy = remedy or _REMEDY
    values = read_json(path)
    try:
        values = schema.check(values, dict[str, Any])
        digest = values.pop(_DIGEST, None)  # versions before 0.2 wrote none
        for name in needed:
            if name not in values:
                raise ValueError(f"{name} is missing")
        found = schema.check(values, hint)
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: {error}: {remedy}") from error
    if digest is not None and digest != _json_digest(values):
        raise CorruptArtifactError(f"{path} is altered: its content is not that of the {_DIGEST} in it: {remedy}")
    return found


def _json_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: each one's name, dtype, shape and bytes, in order of name."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def encode_tensors(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file; in its metadata, as one JSON entry, a record and the tensors' digest."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**record, "sha256": tensors_digest(plain)}, sort_keys=True)  # one entry, for a fixed order
    return save(plain, {_RECORD: text})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **record: str) -> None:
    """Write named tensors as safetensors, with what they are, which `read_tensors` compares."""
    # As bytes: safetensors' own way to a file reports a full disk by an exception that is no OSError.
    write_bytes(path, encode_tensors(tensors, record))


def read_tensors(path: Path, **expected: str) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote onto the CPU, and compare it with the digest in it.

    Args:
        expected: what the file must be, of what was recorded.

    Raises:
        CorruptArtifactError: it is truncated, altered, not safetensors, without a digest, or of something else.
    """
    tensors, record = decode_tensors(read_bytes(path), path)
    if "sha256" not in record:
        raise CorruptArtifactError(
            f"{path} has no digest in it, so it is altered or not copgen_fast's: `python -m copgen_fast.convert` makes "
            "such a file of one that you trust"
        )
    for name, value in expected.items():
        if record.get(name, value) != value:
            raise CorruptArtifactError(f"{path} is of {name} {record[name]}, not {value}: it lies in another's place")
    return tensors


def decode_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file's bytes, compared with the digest in it where it has one, and its record.

    Raises:
        CorruptArtifactError: it is truncated, altered or not safetensors.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        record = schema.check(json.loads(header.get("__metadata__", {}).get(_RECORD, "{}")), dict[str, Any])
        digest = record.get("sha256")
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    if digest is not None and digest != tensors_digest(tensors):
        raise CorruptArtifactError(f"{path} is altered: its tensors are not those of the sha256 in it")
    return tensors, record


def write_checkpoint(path: Path, state: dict) -> None:
    """Write nested state dicts of modules and optimisers, with torch.save."""
    buffer = io.BytesIO()  # torch.save, too, has its own exception for a full disk
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote, without running pickled code; the file's checksums are compared.

    Raises:
        CorruptArtifactError: it is truncated or altered.
    """
    try:
        state = unpickle.tensors(unpickle.load(path, read_bytes(path)), str(path))
        if not isinstance(state, dict):
            raise CorruptArtifactError(f"{path} is no checkpoint of a run, but a {type(state).__name__}")
    except UsageError:
        raise
    except CopgenError as error:
        raise CorruptArtifactError(f"{error}; delete it, and its stage starts again") from error
    return state


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a state dict; any missing, unexpected or misshapen entry is an error that names it.

    Raises:
        CorruptArtifactError: the file does not hold this module.
    """
    own = module.state_dict()
    missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    faults = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected]
    for name in own.keys() & tensors.keys():
        came, wanted = tensors[name], own[name]
        if came.shape != wanted.shape:
            faults.append(f"{name} is {list(came.shape)}, expected {list(wanted.shape)}")
        elif came.is_floating_point() != wanted.is_floating_point():
            faults.append(f"{name} is {came.dtype}, expected {wanted.dtype}")
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        holds = f"; it holds {len(tensors)} tensors, {', '.join(sorted(tensors)[:3])}, ..." if missing else ""
        raise CorruptArtifactError(f"{path} does not fit {type(module).__name__}: {len(faults)} faults: {shown}{holds}")
    module.load_state_dict(tensors)


def require(path: Path, stage: str) -> Path:
    """Return `path`, a file of `stage`.

    Raises:
        UsageError: it is missing; the message says which stage writes it. Or it is a pipe or a device.
    """
    if not path.exists():
        raise UsageError(f"{path} is missing: run `--stages {stage}` on this --out first")
    return path if path.is_dir() else expect_file(path)
