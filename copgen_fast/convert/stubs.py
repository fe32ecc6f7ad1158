"""Stubs for the classes and functions that a checkpoint may name: data without behaviour, one for each name."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from copgen_fast.errors import CopgenError, CorruptArtifactError

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
}
_ARRAY_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")

_SHELLS = {
    "__main__": ("NonlinearWalk", "LinearWalk"),  # the reference's navigators, pickled by a script
    "torch.nn.parallel.data_parallel": ("DataParallel",),
    "torch.nn.modules.container": ("Sequential", "ModuleList", "ModuleDict"),
    "torch.nn.modules.linear": ("Linear", "Identity"),
    "torch.nn.modules.activation": ("ReLU",),
    "torch.nn.modules.conv": ("Conv2d",),
    "torch.nn.modules.batchnorm": ("BatchNorm1d", "BatchNorm2d"),
    "torch.nn.modules.pooling": ("MaxPool2d", "AdaptiveAvgPool2d"),
    "torchvision.models.resnet": ("ResNet", "BasicBlock", "Bottleneck"),
    "argparse": ("Namespace",),  # the options in the reference's encoder checkpoints
}

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
        what = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise CorruptArtifactError(f"{name} is truncated, altered or no checkpoint ({what})") from error


class Shell:
    """Stub of an object whose class is not loaded: `of` is the class's name, `state` the object's attributes."""

    __slots__ = ("state",)
    of = ""

    def __new__(cls) -> Shell:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise CorruptArtifactError(f"the attributes of a {self.of} are no dictionary")
        self.state = state


class _Ordered(dict):
    """collections.OrderedDict, without the attributes (a state dict's version numbers) that a file may set."""

    def __setstate__(self, state: object) -> None:
        pass


class _Function:
    """A callable whose attributes a file cannot set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise CorruptArtifactError("attributes for a function")


class StorageType:
    """Stub of torch.FloatStorage and the like: a dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        raise CorruptArtifactError("attributes for a storage type")


class Storage:
    """Storage of `count` elements in the file; `fetch` returns their bytes."""

    __slots__ = ("_values", "count", "dtype", "fetch")

    def __init__(self, dtype: torch.dtype, count: int, fetch: Callable[[], bytes]) -> None:
        self.dtype, self.count, self.fetch = dtype, count, fetch
        self._values: Tensor | None = None

    def __setstate__(self, state: object) -> None:
        raise CorruptArtifactError("attributes for a storage")

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

    def __setstate__(self, state: object) -> None:
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
        if code not in _ARRAY_DTYPES:
            raise CorruptArtifactError(
                f"arrays of dtype {reprlib.repr(code)} are not read, only of {', '.join(_ARRAY_DTYPES)}"
            )
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


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


def _parameter(data: object, *_: object) -> Stored:
    if not isinstance(data, Stored):
        raise CorruptArtifactError("a parameter that is no tensor")
    return data


def _array(raw: object, dtype: object, shape: object, order: object = "C") -> Stored:
    """A numpy array of `shape`, of exactly the bytes `raw`."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes
    if not isinstance(dtype, _ArrayType) or not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
        raise CorruptArtifactError("an array without dtype or bytes")
    if dtype.order not in ("<", "|", "="):
        raise CorruptArtifactError(
            f"arrays of byte order {reprlib.repr(dtype.order)} are not read, only little-endian ones"
        )
    shape, kind = sizes(shape), np.dtype("<" + dtype.code)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise CorruptArtifactError(f"an array of shape {list(shape)} and dtype {dtype.code} in {len(raw)} bytes")

    def read() -> Tensor:
        stored = np.dtype("u1") if dtype.code == "b1" else kind
        values = torch.from_numpy(np.frombuffer(bytearray(raw), dtype=stored).reshape(shape, order=order))
        return values != 0 if dtype.code == "b1" else values

    return Stored(shape, read)


def _latin1(text: object, encoding: object) -> bytes:
    """Stub of _codecs.encode, by which protocol 2 writes bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise CorruptArtifactError(f"an encoding {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _device(kind: object, index: object = None) -> str:
    """Stub of torch.device, as text: everything is read onto the CPU."""
    return reprlib.repr((kind, index))


def allowed_globals() -> dict[tuple[str, str], object]:
    """Stubs by the (module, name) that a file may name; made anew for every file."""
    known: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): _Ordered,
        ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
        ("torch", "Size"): _Function(sizes),
        ("torch", "device"): _Function(_device),
        ("_codecs", "encode"): _Function(_latin1),
        ("numpy", "dtype"): _Function(_ArrayType),
        ("numpy", "ndarray"): "numpy.ndarray",
    }
    for module in ("builtins", "__builtin__"):
        known[module, "set"] = _Function(set)
        known[module, "bytes"] = _Function(lambda: b"")
    for core in ("numpy.core", "numpy._core"):
        known[f"{core}.multiarray", "_reconstruct"] = _Function(lambda *_: Stored())
        known[f"{core}.multiarray", "scalar"] = _Function(lambda dtype, raw: _array(raw, dtype, ()))
        known[f"{core}.numeric", "_frombuffer"] = _Function(_array)
    for name, dtype in _DTYPES.items():
        known["torch", name] = StorageType(dtype)
        known["torch", str(dtype).removeprefix("torch.")] = dtype
    for module, names in _SHELLS.items():
        for name in names:
            known[module, name] = type(name, (Shell,), {"__slots__": (), "of": f"{module}.{name}"})
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
