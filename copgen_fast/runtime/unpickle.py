"""Reader of checkpoints, by this package's and by other code: nothing that a file names is imported or run.

torch.load(weights_only=True) refuses a whole file for a path or an options object beside its tensors, does not read
whole modules or numpy arrays (detectron2's .pkl), and does not bound what a few bytes may claim: memory, work, or
tensors whose strides repeat elements. Here the pickle's opcodes are interpreted one by one, each with a price in
memory; every object whose class is not plain data becomes a `Shell`, which keeps attributes and has no behaviour.

`load` returns dictionaries, lists and numbers, whose leaves are `Stored` tensors (checked against their bytes, read
lazily, with the checksums that torch.save wrote) and `Shell`s.
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
from typing import Any, NamedTuple

import torch

from copgen_fast.errors import CopgenError, CorruptArtifactError
from copgen_fast.runtime.stubs import Global, Shell, Storage, Stored, build, damage, known_globals, sizes, state_dict

__all__ = ["Content", "Shell", "Stored", "damage", "load", "loads", "state_dict", "tensors"]

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_LEGACY_PROTOCOL = 1001

_CODE = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|ctypes|runpy|importlib|imp|code|webbrowser|pip|torch\.hub)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|breakpoint)|_?io\.open"
)
"""Names that no checkpoint needs: nothing would be run, but a file with one of them is an attack, which is said."""

_FREE_BYTES = 2**26
_MEMORY_FACTOR = 8
_PRICES = {"EMPTY_SET": 280, "EMPTY_DICT": 120, "EMPTY_LIST": 120, "MARK": 140, "BINPERSID": 600}
_PRICES |= {"REDUCE": 1000, "NEWOBJ": 250, "BUILD": 1000}
"""Bytes that an opcode may take, roughly and at most; others take 96 and twice their argument's length."""

_PLAIN_KEYS = (str, bytes, int, float, bool, type(None), Shell, Global, torch.dtype)


class Content(NamedTuple):
    """What a file holds, and the classes and functions named in it that became shells, such as argparse.Namespace."""

    tree: Any
    unknown: tuple[str, ...] = ()


class _Meter:
    """Memory that the content of a file may take: that of the file a few times, and some megabytes for small ones."""

    def __init__(self, size: int) -> None:
        self.left = _FREE_BYTES + _MEMORY_FACTOR * size

    def spend(self, bytes: int) -> None:
        self.left -= bytes
        if self.left < 0:
            raise CorruptArtifactError("its pickle would take far more memory than its size")


class _Machine:
    """Interpreter of one pickle, protocols 2 to 5.

    Args:
        storage: what the tensors' storages are, by their persistent id; None: there are none.
        nested: what a storage is that is a file of torch.save in itself, by its bytes.
    """

    def __init__(
        self,
        name: str,
        meter: _Meter,
        unknown: set[str],
        storage: Callable[[tuple], Storage] | None,
        nested: Callable[[object], Storage],
    ) -> None:
        self.name, self.meter, self.unknown, self.storage = name, meter, unknown, storage
        self.known = known_globals(meter.spend, nested)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise CopgenError(f"{self.name} was refused: pickle opcode {opcode.name}, which no checkpoint needs")
            length = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            self.meter.spend(_PRICES.get(opcode.name, 96) + 2 * length)
            step(self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        if mark > len(self.stack):
            raise CorruptArtifactError("a mark above the stack")
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise CorruptArtifactError("an empty stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def name_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise CorruptArtifactError("a global without a name")
        found = self.known.get((module, name))
        if found is None:
            full = f"{module}.{name}"
            if _CODE.fullmatch(full):
                raise CopgenError(
                    f"{self.name} was refused: it names {full}, which runs code and no checkpoint needs; nothing of it "
                    "was run. Take the file from its authors again, or save its state dict alone"
                )
            found = self.known[module, name] = Global(full)
            self.unknown.add(full)
        self.push(found)

    def call(self, _: object) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise CorruptArtifactError(f"a call of {reprlib.repr(function)}")
        self.push(Shell(function.of) if function.call is None else function.call(*arguments))

    def make(self, _: object) -> None:
        cls, _arguments = self.pop(2)
        if not isinstance(cls, Global) or (cls.call is not None and cls.of != "collections.OrderedDict"):
            raise CorruptArtifactError(f"an object of {reprlib.repr(cls)}")
        self.push(Shell(cls.of) if cls.call is None else cls.call())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, (dict, Shell)):
            raise CorruptArtifactError("items of no dictionary")
        values = target.state if isinstance(target, Shell) else target
        for key, value in zip(items[::2], items[1::2], strict=True):
            values[_key(key)] = value

    def add(self, items: list[Any]) -> None:
        if not isinstance(target := self.stack[-1], set):
            raise CorruptArtifactError("members of no set")
        target.update(map(_key, items))

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Shell):
            raise CorruptArtifactError("members of no list")

    def build(self, _: object) -> None:
        (state,) = self.pop(1)
        build(self.stack[-1], state)

    def persistent(self, _: object) -> None:
        (pid,) = self.pop(1)
        if self.storage is None or not isinstance(pid, tuple) or not pid:
            raise CorruptArtifactError(f"a persistent id {reprlib.repr(pid)}")
        if isinstance(pid[0], str) and pid[0] == "module" and len(pid) == 4 and isinstance(pid[1], Global):
            self.push(pid[1])  # the older format's classes, sent with their source, which is left alone
            return
        whole = isinstance(pid[0], str) and pid[0] == "storage" and len(pid) in (5, 6)
        if not whole or not isinstance(pid[1], Global) or pid[1].dtype is None:
            raise CorruptArtifactError(f"a persistent id {reprlib.repr(pid[0])} that is no storage")
        if not isinstance(pid[2], str) or not re.fullmatch(r"[0-9]{1,20}", pid[2]):
            raise CorruptArtifactError(f"a storage key {reprlib.repr(pid[2])}")
        if len(pid) == 6 and pid[5] is not None:
            raise CorruptArtifactError("a storage that is a view of another (torch before 0.4)")
        sizes((pid[4],))
        self.push(self.storage(pid))


def _key(value: Any) -> Any:
    """A key or a member, checked to take little work to hash: tuples in tuples may take forever."""
    parts = value if type(value) is tuple else (value,)
    if not all(type(part) in _PLAIN_KEYS for part in parts):
        raise CorruptArtifactError(f"a key that is a {type(value).__name__}")
    return value


def _steps() -> dict[str, Callable[[_Machine, Any], None]]:
    """What each opcode does; pickle writes these for data, and an older or rarer one is refused by name."""
    machine = _Machine
    steps: dict[str, Callable[[_Machine, Any], None]] = {
        "STOP": lambda m, x: None,
        "PROTO": lambda m, x: None,
        "FRAME": lambda m, x: None,
        "MARK": lambda m, x: m.marks.append(len(m.stack)),
        "POP": lambda m, x: m.pop(1) and None,
        "POP_MARK": lambda m, x: m.above_mark() and None,
        "NONE": lambda m, x: m.push(None),
        "NEWTRUE": lambda m, x: m.push(True),
        "NEWFALSE": lambda m, x: m.push(False),
        "EMPTY_LIST": lambda m, x: m.push([]),
        "EMPTY_TUPLE": lambda m, x: m.push(()),
        "EMPTY_DICT": lambda m, x: m.push({}),
        "EMPTY_SET": lambda m, x: m.push(set()),
        "APPEND": lambda m, x: m.extend(m.pop(1)),
        "APPENDS": lambda m, x: m.extend(m.above_mark()),
        "TUPLE": lambda m, x: m.push(tuple(m.above_mark())),
        "TUPLE1": lambda m, x: m.push(tuple(m.pop(1))),
        "TUPLE2": lambda m, x: m.push(tuple(m.pop(2))),
        "TUPLE3": lambda m, x: m.push(tuple(m.pop(3))),
        "SETITEM": lambda m, x: m.set_items(m.pop(2)),
        "SETITEMS": lambda m, x: m.set_items(m.above_mark()),
        "ADDITEMS": lambda m, x: m.add(m.above_mark()),
        "MEMOIZE": lambda m, x: m.memo.__setitem__(len(m.memo), m.stack[-1]),
        "GLOBAL": lambda m, x: m.name_global(*x.split(" ", 1)),
        "STACK_GLOBAL": lambda m, x: m.name_global(*m.pop(2)),
        "REDUCE": machine.call,
        "NEWOBJ": machine.make,
        "BUILD": machine.build,
        "BINPERSID": machine.persistent,
    }
    values = """BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
        BYTEARRAY8 BINUNICODE SHORT_BINUNICODE BINUNICODE8"""
    steps |= dict.fromkeys(values.split(), machine.push)
    steps |= dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, x: m.push(m.memo[x]))
    steps |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, x: m.memo.__setitem__(x, m.stack[-1]))
    return steps


_STEPS = _steps()


class _Reader:
    """Reads the pickles of one file, which share a budget of memory.

    Args:
        outer: the reader of the file that this one is part of.
    """

    def __init__(self, data: bytes, name: str, outer: _Reader | None = None) -> None:
        self.name, self.outer = name, outer
        self.meter = _Meter(len(data)) if outer is None else outer.meter
        self.unknown: set[str] = set() if outer is None else outer.unknown

    def unpickle(self, data: bytes, start: int = 0, storage: Callable[[tuple], Storage] | None = None) -> tuple:
        """The content of the pickle that begins at `start`, and where it ends."""
        stream = io.BytesIO(data)
        stream.seek(start)
        value = _Machine(self.name, self.meter, self.unknown, storage, self.nested).run(stream)
        return value, stream.tell()

    def nested(self, data: object) -> Storage:
        """The storage that pickle.dump writes as a whole file of torch.save's older format, in bytes."""
        if self.outer is not None or not isinstance(data, bytes) or not data.startswith(_LEGACY_MAGIC):
            raise CorruptArtifactError(f"a storage in {reprlib.repr(data)}")
        self.meter.spend(2 * len(data))  # the same bytes may be loaded many times
        found = _load_legacy(data, _Reader(data, self.name, self))
        if not isinstance(found, Storage):
            raise CorruptArtifactError("bytes of a storage that hold something else")
        return found


def load(path: Path, data: bytes | None = None) -> Content:
    """Read a file of torch.save (zip or the older format) or a pickle of numpy arrays.

    Args:
        data: the file's bytes, where they are in memory already.

    Returns:
        The content: dictionaries (an OrderedDict comes as a plain one), lists, tuples, sets, numbers, strings,
        `Stored` for tensors, parameters and numpy arrays, `Shell` for objects of other classes.

    Raises:
        CorruptArtifactError: truncated, altered, in none of the formats, or out of proportion.
        CopgenError: it names something that runs code; the message says which.
    """
    return loads(path.read_bytes() if data is None else data, str(path))


def loads(data: bytes, name: str) -> Content:
    """As `load`, from bytes; `name` is for messages."""
    reader = _Reader(data, name)
    with damage(name):
        if data[:2] == b"PK":
            tree = _load_zip(data, reader)
        elif data[257:262] == b"ustar":
            raise CopgenError(f"{name} is in torch's tar format from before version 0.1.10, which is not read")
        elif data.startswith(_LEGACY_MAGIC):
            tree = _load_legacy(data, reader)
        else:
            tree, end = reader.unpickle(data)
            if end != len(data):
                raise CorruptArtifactError(f"{len(data) - end} bytes after its end")
        return Content(tree, tuple(sorted(reader.unknown)))


def tensors(content: Content, name: str) -> Any:
    """The tree with every `Stored` read: dictionaries, lists, tuples and tensors.

    Raises:
        CorruptArtifactError: damaged bytes, or an object of a class that is not plain data.
    """
    done: dict[int, Any] = {}  # by identity, as a few tuples in each other may stand for 2^100

    def read(value: Any) -> Any:
        if id(value) not in done:
            if isinstance(value, dict):
                done[id(value)] = {key: read(item) for key, item in value.items()}
            elif isinstance(value, (list, tuple)):
                done[id(value)] = type(value)(map(read, value))
            elif isinstance(value, (Shell, Global)):
                raise CorruptArtifactError(f"an object of class {value.of}, which is not read")
            else:
                done[id(value)] = value.read() if isinstance(value, Stored) else value
        return done[id(value)]

    with damage(name):
        return read(content.tree)


def _load_zip(data: bytes, reader: _Reader) -> Any:
    name, archive = reader.name, zipfile.ZipFile(io.BytesIO(data))
    records = {record.filename: record for record in archive.infolist()}
    prefix = next(iter(records), "").partition("/")[0]
    if f"{prefix}/constants.pkl" in records:
        raise CopgenError(
            f"{name} is a TorchScript archive, which holds code: it is not read. Save the state dict of the module "
            "that torch.jit.load gives"
        )
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

    return reader.unpickle(archive.read(f"{prefix}/data.pkl"), 0, storage)[0]


def _once(storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """The storage of a key; tensors that share it must agree on its dtype and size."""
    kept = storages.setdefault(key, storage)
    if (kept.dtype, kept.count) != (storage.dtype, storage.count):
        raise CorruptArtifactError(f"storage {key} has two dtypes or sizes")
    return kept


def _load_legacy(data: bytes, reader: _Reader) -> Any:
    """Five pickles (magic number, version, machine, content, storage keys), then each storage: its size, its bytes."""
    storages: dict[str, Storage] = {}
    raw: dict[str, bytes] = {}

    def storage(pid: tuple) -> Storage:
        dtype, key, count = pid[1].dtype, pid[2], pid[4]
        return _once(storages, key, Storage(dtype, count, lambda: raw[key]))

    version, at = reader.unpickle(data, len(_LEGACY_MAGIC))
    machine, at = reader.unpickle(data, at)
    if version != _LEGACY_PROTOCOL or machine["little_endian"] is not True:
        raise CopgenError(
            f"{reader.name} is of version {reprlib.repr(version)} or from a big-endian machine, which is not read"
        )
    tree, at = reader.unpickle(data, at, storage)
    keys, at = reader.unpickle(data, at)
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
