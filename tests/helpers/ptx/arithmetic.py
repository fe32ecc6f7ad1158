"""What PTX instructions without memory or other threads compute, on arrays with a number per thread.

Rounding is the hardware's: to nearest even, once per instruction. Instructions that NVIDIA documents as approximate
(div.full, ex2.approx, ...) are rounded correctly here, from float64.
"""

import functools
import operator
from collections.abc import Callable

import numpy as np

INTEGERS = {f"{kind}{8 * n}": np.dtype(f"{code}{n}") for kind, code in ("bu", "uu", "si") for n in (1, 2, 4, 8)}
FLOATS = {f"f{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)}
_LACKED = {"bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "f32x2": "u8"}
DTYPES = INTEGERS | FLOATS | {"pred": np.dtype(bool)} | {kind: np.dtype(bits) for kind, bits in _LACKED.items()}
"""NumPy's type of each of PTX; of those that it lacks, their bits."""
BITS = {kind: np.dtype(bool if kind == "pred" else f"u{dtype.itemsize}") for kind, dtype in DTYPES.items()}
"""Those of their bits in registers."""
_IMPLIED = ("lo", "rn", "full", "approx", "ftz")  # by the rest of an opcode, or for all instructions to take
_SMALLEST_NORMAL = np.float32(2.0**-126)


def operation(opcode: tuple[str, ...], count: int) -> tuple[Callable[..., np.ndarray], tuple[str, ...]]:
    """What an opcode, split at its dots, computes of `count` inputs, and their types.

    Raises:
        LookupError, TypeError, ValueError: it is none of those that the project's kernels have.
    """
    name, *rest = opcode
    kinds, how = [x for x in rest if x in DTYPES], [x for x in rest if x not in DTYPES and x not in _IMPLIED]
    if name == "cvt":
        compute, inputs = _conversion(*kinds, *how), (kinds[1],) * count
    elif (name, kinds) == ("fma", ["f32", "f16"]):
        compute, inputs = fma, ("f16", "f16", "f32")
    elif kinds == ["f32x2"]:
        single, _ = operation((*opcode[:-1], "f32"), count)
        compute = lambda *given: single(*(x.view(np.float32) for x in given)).view(np.uint64)  # noqa: E731
        inputs = ("f32x2",) * count
    else:
        (kind,) = kinds
        if kind in ("f16", *_LACKED) or (name, kind) == ("fma", "f64"):
            raise KeyError(opcode)
        compute = _TABLE[".".join([name, *how])]
        types = {"": kind, "wide": f"{kind[0]}{16 * DTYPES[kind].itemsize}"}
        inputs = tuple(types.get(x, x) for x in _INPUTS.get(".".join([name, *how]), [""] * count))
    return _flushing(compute) if "ftz" in rest else compute, inputs


def _flushing(function):
    """With subnormal float32 numbers as zeros of their sign, before and after."""

    def flush(x):
        return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)

    return lambda *given: flush(function(*map(flush, given)))


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


def _shift(function):
    """By any number of bits, as NumPy's functions do it, too."""
    return lambda a, n: function(a, np.minimum(n, 64).astype(a.dtype))


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


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers as bfloat16."""
    bits = x.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return np.where(np.isnan(x), 0x7FFF, rounded >> 16).astype(np.uint16)


def from_bfloat(x: np.ndarray) -> np.ndarray:
    """Float32 numbers of bits of bfloat16."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _pair(narrow):
    """Two float32 numbers as one of their halves each, the first in the upper bits."""
    return lambda upper, lower: narrow(upper).astype(np.uint32) << 16 | narrow(lower)


_CONVERSIONS = {
    ("f32", "bf16"): from_bfloat,
    ("bf16", "f32"): to_bfloat,
    ("bf16x2", "f32"): _pair(to_bfloat),
    ("f16x2", "f32"): _pair(lambda x: x.astype(np.float16).view(np.uint16)),
}
"""From the second type to the first, of which NumPy lacks one."""


def _conversion(into, source, rounding=None):
    """What cvt computes; the project's kernels have none from floats to integers."""
    dtype = DTYPES[into]
    if rounding == "rmi" and {into, source} <= FLOATS.keys():
        return lambda x: np.floor(x).astype(dtype)
    if rounding is not None:
        raise KeyError(rounding)
    if source in INTEGERS and into in INTEGERS | FLOATS or source in FLOATS and into in FLOATS:
        return lambda x: x.astype(dtype)
    return _CONVERSIONS[into, source]


def _precisely(function):
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _of_all(function):
    return lambda *given: functools.reduce(function, given)


def _twice_as_wide(x):
    return x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


def _beside_nan(compare, result):
    """A comparison that is `result` where one number is NaN."""
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), result, compare(a, b))


_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_TABLE = {
    "selp": lambda a, b, p: np.where(p, a, b),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.wide": lambda a, b: _twice_as_wide(a) * b,
    "mul.hi": lambda a, b: (_twice_as_wide(a) * b >> 8 * a.dtype.itemsize).astype(a.dtype),
    "mad": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _twice_as_wide(a) * b + c,
    "fma": fma,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b,
    "rem": np.fmod,
    "neg": np.negative,
    "abs": np.abs,
    "min": _of_all(np.fmin),
    "max": _of_all(np.fmax),
    "ex2": _precisely(np.exp2),
    "sqrt": _precisely(np.sqrt),
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _extract,
    "bfi": _insert,
    "clz": lambda a: 8 * a.dtype.itemsize - np.frexp(a.astype(np.float64))[1],
    "setp.num": _beside_nan(lambda a, b: True, False),
    **{f"setp.{name}": _beside_nan(compare, False) for name, compare in _COMPARISONS.items()},
    **{f"setp.{name}u": _beside_nan(compare, True) for name, compare in _COMPARISONS.items()},
}
_INPUTS = {
    "selp": ("", "", "pred"),
    "mad.wide": ("", "", "wide"),
    "shl": ("", "u32"),
    "shr": ("", "u32"),
    "bfe": ("", "u32", "u32"),
    "bfi": ("", "", "u32", "u32"),
}
"""Types of inputs, where not all are the opcode's: "" for that, "wide" for twice its width."""
