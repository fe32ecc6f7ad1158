"""What PTX instructions without memory or other threads compute, on arrays with a number per thread.

Rounding is the hardware's: to nearest even, once per instruction. Instructions that NVIDIA documents as approximate
(div.full, ex2.approx, ...) are rounded correctly here, from float64.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DTYPES = {
    **{f"{kind}{8 * n}": np.dtype(f"{code}{n}") for kind, code in ("bu", "uu", "si") for n in (1, 2, 4, 8)},
    **{f"f{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{"pred": np.dtype(bool), "bf16": np.dtype("u2")},
    **{"f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "f32x2": np.dtype("u8")},
}
"""NumPy's type of each of PTX; of those that it lacks, their bits."""
_SMALLEST_NORMAL = np.float32(2.0**-126)


class Operation(NamedTuple):
    """A function of `inputs` (types) with one result of type `result`."""

    compute: Callable[..., np.ndarray]
    result: str
    inputs: tuple[str, ...]


@functools.cache
def operation(opcode: tuple[str, ...], count: int) -> Operation:
    """That of an opcode, split at its dots, with `count` inputs.

    Raises:
        KeyError: it is none of those that the project's kernels have.
    """
    name, *rest = opcode
    kinds, how = [x for x in rest if x in DTYPES], {x for x in rest if x not in DTYPES}
    if name == "cvt":
        return _convert(kinds, how)
    (kind,) = kinds[-1:] or [""]
    if kind == "f32x2":
        single = operation((*opcode[:-1], "f32"), count)
        compute = lambda *given: single.compute(*(x.view(np.float32) for x in given)).view(np.uint64)  # noqa: E731
        return Operation(compute, kind, (kind,) * count)
    if name == "setp":
        (relation,) = how - {"ftz"}
        return Operation(_of_floats(relation) if kind[0] == "f" else _RELATIONS[relation], "pred", (kind, kind))
    if {"wide", "hi"} & how:
        bits = int(kind[1:])
        double = f"{kind[0]}{2 * bits}"
        wide, narrow = DTYPES[double], DTYPES[kind]
        forms = {
            ("mul", "wide"): (lambda a, b: a.astype(wide) * b, double, (kind, kind)),
            ("mad", "wide"): (lambda a, b, c: a.astype(wide) * b + c, double, (kind, kind, double)),
            ("mul", "hi"): (lambda a, b: (a.astype(wide) * b >> bits).astype(narrow), kind, (kind, kind)),
        }
        return Operation(*forms[(name, "".join(how))])
    if not how <= {"lo", "rn", "full", "approx", "ftz"} or (name, kind) == ("fma", "f64"):
        raise KeyError(opcode)
    compute = (_COMMON | (_FLOATS if kind[0] == "f" else _INTEGERS))[name]
    inputs = tuple(x or kind for x in _INPUTS.get(name, (None,) * count))
    return Operation(_flushing(compute) if "ftz" in how else compute, kind, inputs)


def _precisely(function):
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _of_all(function):
    return lambda *given: functools.reduce(function, given)


def _flushing(function):
    return lambda *given: flush(function(*map(flush, given)))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign; all others as they are."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 numbers, rounded once.

    The product is exact in float64; rounding their sum twice goes wrong only where the first rounding ends in the
    middle of two float32 numbers, or beyond their precision. There, as Boldo and Melquiond, Emulation of FMA and
    correctly rounded sums (2008): the sum is rounded to odd, which keeps whether it was exact.
    """
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + c
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    doubtful = middle | ((np.abs(total) < _SMALLEST_NORMAL) & (total != 0))
    if doubtful.any():
        total = np.where(doubtful, _sum_to_odd(product, c), total)
    return total.astype(np.float32)


def _sum_to_odd(a, b):
    total = a + b
    kept = total - a
    error = (a - (total - kept)) + (b - kept)  # of the rounded sum (Knuth)
    between = (error != 0) & np.isfinite(error) & ((total.view(np.int64) & 1) == 0)
    return np.where(between, np.nextafter(total, np.copysign(np.inf, error)), total)


def _divide(a, b):
    """Quotient towards zero, and remainder."""
    divisor = np.where(b == 0, b.dtype.type(1), b)  # any result will do
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient += (a - quotient * divisor != 0) & ((a < 0) != (divisor < 0))
    return quotient, a - quotient * divisor


def _shift_left(a, n):
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0)


def _shift_right(a, n):
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n < bits, moved, 0)


def _extract(a, at, count):
    """Field of `count` bits from bit `at`, with its sign."""
    bits = 8 * a.dtype.itemsize
    left = np.maximum(bits - at.astype(np.int64) - count, 0)
    right = np.minimum(left + at, bits - 1)
    return np.where(count > 0, (a << left.astype(a.dtype)) >> right.astype(a.dtype), 0)


def _insert(a, b, at, count):
    """b with the lowest `count` bits of a from bit `at` on."""
    at, field = at.astype(np.uint64), (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
    return (b & ~(field << at) | (a & field) << at).astype(b.dtype)


def _leading_zeros(a):
    return 8 * a.dtype.itemsize - np.frexp(a.astype(np.float64))[1]


_COMMON = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs, "mov": np.asarray},
    "selp": lambda a, b, p: np.where(p, a, b),
}
_FLOATS = {
    **{"fma": fma, "div": np.divide, "min": _of_all(np.fmin), "max": _of_all(np.fmax)},
    **{"ex2": _precisely(np.exp2), "sqrt": _precisely(np.sqrt)},
}
_INTEGERS = {
    **{"min": _of_all(np.minimum), "max": _of_all(np.maximum), "not": np.invert},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"shl": _shift_left, "shr": _shift_right, "bfe": _extract, "bfi": _insert, "clz": _leading_zeros},
    "div": lambda a, b: _divide(a, b)[0],
    "rem": lambda a, b: _divide(a, b)[1],
    "mad": lambda a, b, c: a * b + c,
}
_INPUTS = {
    **{"shl": (None, "u32"), "shr": (None, "u32"), "selp": (None, None, "pred")},
    **{"bfe": (None, "u32", "u32"), "bfi": (None, None, "u32", "u32")},
}
"""Types of inputs that differ from the opcode's (None: its)."""
_RELATIONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    "ge": np.greater_equal,
}


def _of_floats(relation):
    """One that is false beside NaN, or, with a u at its end, true; num is true without NaN."""
    name, beside_nan = ("eq", False) if relation == "num" else (relation[:2], len(relation) == 3)

    def compute(a, b):
        found = (relation == "num") | _RELATIONS[name](a, b)
        return np.where(np.isnan(a) | np.isnan(b), beside_nan, found)

    return compute


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers as bfloat16."""
    bits = x.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return np.where(np.isnan(x), 0x7FFF, rounded >> 16).astype(np.uint16)


def from_bfloat(x: np.ndarray) -> np.ndarray:
    """Float32 numbers of bits of bfloat16."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _convert(kinds, how):
    into, source = kinds
    dtype, rounding = DTYPES[into], how - {"ftz"}
    if into in ("f16x2", "bf16x2") and source == "f32" and rounding == {"rn"}:
        narrow = to_bfloat if into == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        compute = lambda upper, lower: narrow(upper).astype(np.uint32) << 16 | narrow(lower)  # noqa: E731
        return Operation(compute, into, (source, source))
    if (source, into) in (("bf16", "f32"), ("f32", "bf16")) and rounding <= {"rn"}:
        compute = to_bfloat if into == "bf16" else from_bfloat
    elif (into[0] == "f" and rounding <= {"rn"}) or (source[0] in "bus" and into[0] in "bus" and not rounding):
        compute = lambda x: x.astype(dtype)  # noqa: E731
    elif into[0] == source[0] == "f" and rounding == {"rmi"}:
        compute = lambda x: np.floor(x).astype(dtype)  # noqa: E731
    else:
        raise KeyError(("cvt", *kinds, *how))
    return Operation(_flushing(compute) if "ftz" in how else compute, into, (source,))
