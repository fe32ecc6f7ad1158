"""Restricted unpickler for checkpoints of other code: nothing that a file names is imported or run.

For what torch.load(weights_only=True), which reads our own files, does not take: pickles of numpy arrays (detectron2's
.pkl, protocols 2 to 5), whole modules in torch's older format, and tensors whose strides repeat elements, of which a
few bytes can claim petabytes (refused here).

`load` returns dictionaries, lists and numbers, whose leaves are `Stored` tensors (checked against their bytes, read
lazily) and `Shell`s: whole modules pickled with their class, of which only the attributes are kept. A file may name
the globals that stubs.py lists and no others; and each stands for a stub without behaviour, so that even an allowed
name cannot be turned against the reader.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from copgen_fast.convert.stubs import Shell, Storage, StorageType, Stored, allowed_globals, damage, sizes, state_dict
from copgen_fast.errors import CopgenError, CorruptArtifactError

__all__ = ["Shell", "Stored", "damage", "load", "loads", "state_dict"]

_OPCODES = set(
    """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ
    BINPERSID""".split()
)
"""What pickle writes in protocols 2 to 5 for data; an older or rarer opcode is refused by name."""

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_LEGACY_PROTOCOL = 1001
_MOST_TUPLES = 50_000


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, name: str, storage: Callable[[tuple], Storage] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._name, self._storage, self._known = name, storage, allowed_globals()

    def find_class(self, module: str, name: str) -> object:
        found = self._known.get((module, name))
        if found is None:
            raise CopgenError(
                f"{self._name} was refused: it names {module}.{name}, which no checkpoint of tensors and "
                "known modules needs; nothing of it was run"
            )
        return found

    def persistent_load(self, pid: object) -> object:
        if self._storage is None or not isinstance(pid, tuple) or not pid:
            raise CorruptArtifactError(f"a persistent id {reprlib.repr(pid)}")
        if pid[0] == "module" and len(pid) == 4 and isinstance(pid[1], type) and issubclass(pid[1], Shell):
            return pid[1]  # the older format's classes, sent with their source, which is left alone
        if pid[0] != "storage" or len(pid) not in (5, 6) or not isinstance(pid[1], StorageType):
            raise CorruptArtifactError(f"a persistent id {reprlib.repr(pid[0])} that is no storage")
        if not isinstance(pid[2], str) or not re.fullmatch(r"[0-9]{1,20}", pid[2]):
            raise CorruptArtifactError(f"a storage key {reprlib.repr(pid[2])}")
        if pid[5:] not in ((), (None,)):
            raise CorruptArtifactError("a storage that is a view of another (torch before 0.4)")
        sizes((pid[4],))
        return self._storage(pid)


def _unpickle(data: bytes, start: int, name: str, storage: Callable[[tuple], Storage] | None = None) -> tuple[Any, int]:
    """The content of the pickle that begins at `start`, and where it ends.

    Its opcodes are checked first: lengths must lie within the data, and memo indices within the number of opcodes, so
    that a few bytes cannot make the unpickler allocate gigabytes.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    tuples = 0
    for number, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if opcode.name not in _OPCODES:
            raise CopgenError(f"{name} was refused: pickle opcode {opcode.name}, which no checkpoint needs")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > _MOST_TUPLES:  # nested, they would overflow the stack when hashed
            raise CorruptArtifactError(f"more than {_MOST_TUPLES} tuples")
        if opcode.name == "LONG_BINPUT" and argument > number:
            raise CorruptArtifactError(f"memo index {argument} at opcode {number}")
        if opcode.name == "FRAME" and argument > len(data) - position:
            raise CorruptArtifactError(f"a frame of {argument} bytes")
    end = stream.tell()
    return _Unpickler(data[start:end], name, storage).load(), end


def load(path: Path) -> Any:
    """Read a file of torch.save (zip or the older format) or a pickle of numpy arrays.

    Returns:
        The content: dictionaries (an OrderedDict comes as a plain one), lists, tuples, sets, numbers, strings,
        `Stored` for tensors, parameters and numpy arrays, `Shell` for objects of known classes.

    Raises:
        CorruptArtifactError: truncated, altered, or in none of the formats.
        CopgenError: it names a global that is not on the list; the message says which.
    """
    return loads(path.read_bytes(), str(path))


def loads(data: bytes, name: str) -> Any:
    """As `load`, from bytes; `name` is for messages."""
    with damage(name):
        if data[:2] == b"PK":
            return _load_zip(data, name)
        if data[257:262] == b"ustar":
            raise CopgenError(f"{name} is in torch's tar format from before version 0.1.10, which is not read")
        if data.startswith(_LEGACY_MAGIC):
            return _load_legacy(data, name)
        tree, end = _unpickle(data, 0, name)
        if end != len(data):
            raise CorruptArtifactError(f"{len(data) - end} bytes after its end")
        return tree


def _load_zip(data: bytes, name: str) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(data))
    records = {record.filename: record for record in archive.infolist()}
    prefix = next(iter(records), "").partition("/")[0]
    if f"{prefix}/constants.pkl" in records:
        raise CopgenError(f"{name} is a TorchScript archive, which holds code: it is not read")
    if f"{prefix}/data.pkl" not in records or len(records) != len(archive.infolist()):
        raise CorruptArtifactError("a zip file that torch.save did not write: no data.pkl, or a name twice")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise CorruptArtifactError("a compressed zip file, which torch.save does not write")
    if sum(record.file_size for record in records.values()) > len(data):
        raise CorruptArtifactError("zip records that overlap")
    if f"{prefix}/byteorder" in records and archive.read(f"{prefix}/byteorder") != b"little":
        raise CopgenError(f"{name} was written on a big-endian machine, which is not read")
    storages: dict[str, Storage] = {}

    def storage(pid: tuple) -> Storage:
        dtype, key, count = pid[1].dtype, pid[2], pid[4]
        record = f"{prefix}/data/{key}"
        if record not in records or records[record].file_size != count * dtype.itemsize:
            raise CorruptArtifactError(f"storage {key} is missing or not of {count} {dtype}")
        return _once(storages, key, Storage(dtype, count, lambda: archive.read(record)))

    return _unpickle(archive.read(f"{prefix}/data.pkl"), 0, name, storage)[0]


def _once(storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """The storage of a key; tensors that share it must agree on its dtype and size."""
    kept = storages.setdefault(key, storage)
    if (kept.dtype, kept.count) != (storage.dtype, storage.count):
        raise CorruptArtifactError(f"storage {key} has two dtypes or sizes")
    return kept


def _load_legacy(data: bytes, name: str) -> Any:
    """Five pickles (magic number, version, machine, content, storage keys), then each storage: its size, its bytes."""
    storages: dict[str, Storage] = {}
    raw: dict[str, bytes] = {}

    def storage(pid: tuple) -> Storage:
        dtype, key, count = pid[1].dtype, pid[2], pid[4]
        return _once(storages, key, Storage(dtype, count, lambda: raw[key]))

    version, at = _unpickle(data, len(_LEGACY_MAGIC), name)
    machine, at = _unpickle(data, at, name)
    if version != _LEGACY_PROTOCOL or machine["little_endian"] is not True:
        raise CopgenError(
            f"{name} is of version {reprlib.repr(version)} or from a big-endian machine, which is not read"
        )
    tree, at = _unpickle(data, at, name, storage)
    keys, at = _unpickle(data, at, name)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise CorruptArtifactError("its list of storages is not that of its tensors")
    for key in keys:
        (count,) = struct.unpack_from("<q", data, at)
        size = storages[key].count * storages[key].dtype.itemsize
        raw[key] = data[at + 8 : at + 8 + size]
        if count != storages[key].count or len(raw[key]) != size:
            raise CorruptArtifactError(f"storage {key} is truncated or of another size")
        at += 8 + size
    return tree
