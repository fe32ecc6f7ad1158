"""Stubs for the classes and functions that a checkpoint names: data without behaviour."""

from __future__ import annotations

import contextlib
import functools
import math
import reprlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from copgen_fast.errors import CopgenError, CorruptArtifactError, in_one_line

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_ARRAY_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")

_LARGEST_SIZE = 2**31


@contextlib.contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn whatever the readers raise for damaged data into one error that names the file."""
    try:
        yield
    except CorruptArtifactError as error:
        if str(error).startswith(name):
            raise
        raise CorruptArtifactError(f"{name} is damaged: {error}") from error
    except CopgenError:
        raise
    except Exception as error:  # pickle and zipfile raise nearly anything, depending on the byte
        raise CorruptArtifactError(f"{name} is truncated, altered or no checkpoint ({in_one_line(error)})") from error


class Global:
    """A name in a file: `call` is what it does here (None: nothing, its results are shells)."""

    __slots__ = ("call", "dtype", "of")

    def __init__(self, of: str, call: Callable[..., object] | None = None, dtype: torch.dtype | None = None) -> None:
        self.of, self.call, self.dtype = of, call, dtype


class Shell:
    """Stub of an object whose class is not loaded: `of` is the class's name, `state` the object's attributes."""

    __slots__ = ("of", "state")

    def __init__(self, of: str) -> None:
        self.of = of
        self.state: dict = {}


def build(target: object, state: object) -> None:
    """Give an object the attributes that a file has for it."""
    if isinstance(target, Shell):
        parts = state if isinstance(state, tuple) else (state,)  # with __slots__, attributes come in two parts
        target.state = next((part for part in parts if isinstance(part, dict) and part), target.state)
    elif isinstance(target, Stored):
        target.fill(state)
    elif isinstance(target, _ArrayType):
        target.order = state[1]
    elif not isinstance(target, dict):  # of an OrderedDict: a state dict's version numbers
        raise CorruptArtifactError(f"attributes for a {type(target).__name__}")


class Storage:
    """Storage of `count` elements in the file; `fetch` returns their bytes."""

    __slots__ = ("_values", "count", "dtype", "fetch")

    def __init__(self, dtype: torch.dtype, count: int, fetch: Callable[[], bytes]) -> None:
        self.dtype, self.count, self.fetch = dtype, count, fetch
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """All elements, [count]; read once."""
        if self._values is None:
            raw = self.fetch()
            if len(raw) != self.count * self.dtype.itemsize:
                raise CorruptArtifactError(f"a storage of {self.count} {self.dtype} holds {len(raw)} bytes")
            stored = torch.uint8 if self.dtype == torch.bool else self.dtype
            values = torch.frombuffer(bytearray(raw), dtype=stored) if raw else torch.empty(0, dtype=stored)
            self._values = values != 0 if self.dtype == torch.bool else values
        return self._values


class Stored:
    """A tensor or array in a file: its `shape` is known and fits its bytes, which `read` fetches."""

    __slots__ = ("_read", "shape")

    def __init__(self, shape: tuple[int, ...] = (), read: Callable[[], Tensor] | None = None) -> None:
        self.shape, self._read = shape, read

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CorruptArtifactError: its bytes are damaged.
        """
        if self._read is None:
            raise CorruptArtifactError("an array without content")
        with damage("a tensor"):
            return self._read()

    def fill(self, state: object) -> None:
        """The content of a numpy array, as numpy pickles it: (version, shape, dtype, Fortran order, bytes)."""
        if self._read is not None:
            raise CorruptArtifactError("attributes for a tensor")
        _, shape, dtype, fortran, raw = state
        filled = _array(raw, dtype, shape, "F" if fortran else "C")
        self.shape, self._read = filled.shape, filled._read


class _ArrayType:
    """numpy.dtype: a code such as f4, and the byte order that a file sets afterwards."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "<"


def sizes(value: object) -> tuple[int, ...]:
    """A shape, or other sizes of dimensions, checked to be sane integers."""
    whole = isinstance(value, (tuple, list)) and len(value) <= 16
    if not whole or any(type(size) is not int or not 0 <= size < _LARGEST_SIZE for size in value):
        raise CorruptArtifactError(f"{reprlib.repr(value)} is no shape")
    return tuple(value)


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Stored:
    """Stub of torch._utils._rebuild_tensor_v2: a view within a storage that repeats no element."""
    size, stride, (offset,) = sizes(size), sizes(stride), sizes((offset,))
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise CorruptArtifactError("a tensor without storage, or with a stride of another length than its shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
    if last >= storage.count or count > storage.count:
        raise CorruptArtifactError(
            f"a tensor of shape {list(size)}, stride {list(stride)} and offset {offset} lies outside its storage "
            f"of {storage.count} elements"
        )
    return Stored(size, lambda: storage.values().as_strided(size, stride, offset))


def _untyped_tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> Stored:
    """Stub of torch._utils._rebuild_tensor_v3, for dtypes without a storage type: bytes, and their dtype."""
    dtype = rest[2]
    if not isinstance(dtype, torch.dtype) or not isinstance(storage, Storage) or storage.dtype != torch.uint8:
        raise CorruptArtifactError("an untyped tensor without bytes or dtype")
    whole = Storage(dtype, storage.count // dtype.itemsize, storage.fetch)
    return _tensor(whole, offset, size, stride)


def _parameter(data: object, *_: object) -> Stored:
    if not isinstance(data, Stored):
        raise CorruptArtifactError("a parameter that is no tensor")
    return data


def _array(raw: object, dtype: object, shape: object, order: object = "C") -> Stored:
    """A numpy array of `shape`, of exactly the bytes `raw`; of a dtype that tensors lack, it can't be read."""
    if not isinstance(dtype, _ArrayType) or order not in ("C", "F"):
        raise CorruptArtifactError("an array without dtype")
    shape = sizes(shape)
    if dtype.code not in _ARRAY_DTYPES or dtype.order not in ("<", "|", "="):
        what = f"arrays of dtype {reprlib.repr(dtype.code)} and byte order {reprlib.repr(dtype.order)} are not read"
        return Stored(shape, functools.partial(_refuse, f"{what}, only little-endian {', '.join(_ARRAY_DTYPES)}"))
    kind = np.dtype("<" + dtype.code)
    if not isinstance(raw, (bytes, bytearray, str)) or math.prod(shape) * kind.itemsize != len(raw):
        raise CorruptArtifactError(f"an array of shape {list(shape)} and dtype {dtype.code} in {reprlib.repr(raw)}")

    def read() -> Tensor:
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes
        stored = np.dtype("u1") if dtype.code == "b1" else kind
        values = torch.from_numpy(np.frombuffer(bytearray(data), dtype=stored).reshape(shape, order=order))
        return values != 0 if dtype.code == "b1" else values

    return Stored(shape, read)


def _refuse(why: str) -> Tensor:
    raise CorruptArtifactError(why)


def _device(kind: object, index: object = None) -> str:
    """Stub of torch.device, as text: everything is read onto the CPU."""
    return reprlib.repr((kind, index))


def _persistent(meta: object) -> Shell:
    """Stub of torch_utils.persistence in StyleGAN's releases: an object whose class comes as source, left alone."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise CorruptArtifactError("a persistent object without a class")
    shell = Shell(meta["class_name"])
    build(shell, meta.get("state"))
    return shell


def known_globals(spend: Callable[[int], None], nested: Callable[[object], Storage]) -> dict[tuple[str, str], object]:
    """Stubs by the (module, name) of what makes tensors and plain data; made anew for every file.

    Args:
        spend: called with the bytes that a call copies, as a file may make the same call many times.
        nested: reads a storage that lies in the pickle as bytes.
    """

    def latin1(text: object, encoding: object) -> bytes:
        """Stub of _codecs.encode, by which protocol 2 writes bytes."""
        if encoding != "latin1" or not isinstance(text, str):
            raise CorruptArtifactError(f"an encoding {reprlib.repr(encoding)}")
        spend(len(text))
        return text.encode("latin1")

    def members(values: object = ()) -> set:
        if not isinstance(values, (list, tuple)) or not all(type(value) in (str, int, float) for value in values):
            raise CorruptArtifactError("members of a set that are no plain values")
        spend(100 * len(values))
        return set(values)

    def ordered(items: object = ()) -> dict:
        """Stub of collections.OrderedDict; Python 2 gives its items to the call."""
        if not isinstance(items, (list, tuple)) or not all(type(key) is str for key, _ in items):
            raise CorruptArtifactError("items of a dictionary whose keys are no text")
        spend(100 * len(items))
        return dict(items)

    calls: dict[str, Callable[..., object]] = {
        "collections.OrderedDict": ordered,
        "collections.defaultdict": lambda *_: {},
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _untyped_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": nested,
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
        "torch.Size": sizes,
        "torch.device": _device,
        "_codecs.encode": latin1,
        "numpy.dtype": _ArrayType,
    }
    for module in ("builtins", "__builtin__"):
        calls |= {f"{module}.set": members, f"{module}.bytes": lambda: b""}
    for core in ("numpy.core", "numpy._core"):
        calls[f"{core}.multiarray._reconstruct"] = lambda *_: Stored()
        calls[f"{core}.multiarray.scalar"] = lambda dtype, raw: _array(raw, dtype, ())
        calls[f"{core}.numeric._frombuffer"] = _array
    known = {tuple(name.rsplit(".", 1)): Global(name, call) for name, call in calls.items()}
    known |= {("torch", name): Global(f"torch.{name}", dtype=dtype) for name, dtype in _DTYPES.items()}
    known["torch.storage", "UntypedStorage"] = Global("torch.storage.UntypedStorage", dtype=torch.uint8)
    known |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    known["numpy", "ndarray"] = "numpy.ndarray"
    return known


def state_dict(module: Shell, prefix: str = "", seen: set[int] | None = None) -> dict[str, Stored]:
    """Parameters and buffers of a pickled module by dotted name, as its state_dict() would give them.

    Raises:
        CorruptArtifactError: attributes that no module has, or a module that is in two places.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise CorruptArtifactError(f"{prefix}: a module that is in two places")
    seen.add(id(module))
    found: dict[str, Stored] = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        members = module.state.get(kind, {})
        if not isinstance(members, dict) or not all(isinstance(name, str) for name in members):
            raise CorruptArtifactError(f"a {module.of} without names of its {kind[1:]}")
        for name, value in members.items():
            if kind == "_modules" and isinstance(value, Shell):
                found |= state_dict(value, f"{prefix}{name}.", seen)
            elif kind != "_modules" and isinstance(value, Stored):
                found[prefix + name] = value
            elif value is not None:
                raise CorruptArtifactError(f"{prefix}{name} is neither tensor nor module")
    return found
