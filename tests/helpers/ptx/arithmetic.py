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
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TRANSCENDENTAL = {
    **{"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": np.reciprocal, "sin": np.sin, "cos": np.cos},
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
_SMALLEST_NORMAL = np.float32(2.0**-126)


class Operation(NamedTuple):
    """A function of `inputs` (types) with one result of type `result`."""

    compute: Callable[..., np.ndarray]
    result: str
    inputs: tuple[str, ...]


@functools.cache
def operation(opcode: tuple[str, ...], count: int = 2) -> Operation:
    """That of an opcode, split at its dots, with `count` inputs where these vary.

    Raises:
        KeyError: it is none of those that the project's kernels have.
    """
    name, *rest = opcode
    kinds, how = [x for x in rest if x in DTYPES], {x for x in rest if x not in DTYPES}
    if name == "cvt":
        return _convert(kinds, how)
    (kind,) = kinds[-1:] or [""]
    if kind == "f32x2":
        single = operation((*opcode[:-1], "f32"))
        compute = lambda *given: single.compute(*(x.view(np.float32) for x in given)).view(np.uint64)  # noqa: E731
        return Operation(compute, kind, (kind,) * len(single.inputs))
    if name == "setp":
        how.discard("ftz")
        return Operation(_compare(*how, kind[0] == "f"), "pred", (kind, kind))
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
    if not how <= {"lo", "rn", "full", "approx", "ftz"}:
        raise KeyError(opcode)
    compute, inputs = _function(name, kind)
    if name in ("min", "max") and count > 2:
        two = compute
        compute, inputs = lambda *given: functools.reduce(two, given), (None,) * count
    compute = _flushing(compute) if "ftz" in how else compute
    return Operation(compute, kind, tuple(kind if x is None else x for x in inputs))


def _function(name, kind):
    """Function and its inputs' types (None: `kind`)."""
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    one, two, three = (None,), (None, None), (None, None, None)
    if kind[0] == "f":
        by_name = {
            **{"fma": (fma, three), "div": (np.divide, two), "min": (np.fmin, two), "max": (np.fmax, two)},
            **{n: (_precisely(f), one) for n, f in _TRANSCENDENTAL.items()},
        }
    else:
        by_name = {
            "div": (lambda a, b: _divide(a, b)[0], two),
            "rem": (lambda a, b: _divide(a, b)[1], two),
            "min": (np.minimum, two),
            "max": (np.maximum, two),
            "mad": (lambda a, b, c: a * b + c, three),
            "shl": (lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(dtype), 0), (None, "u32")),
            "shr": (lambda a, n: _shift_right(a, n, bits), (None, "u32")),
            "bfe": (lambda a, at, n: _extract(a, at, n, bits), (None, "u32", "u32")),
            "bfi": (_insert, (None, None, "u32", "u32")),
            "clz": (lambda a: bits - np.frexp(a.astype(np.float64))[1], one),
            "not": (np.invert, one),
            **{"and": (np.bitwise_and, two), "or": (np.bitwise_or, two), "xor": (np.bitwise_xor, two)},
        }
    by_name |= {
        **{"add": (np.add, two), "sub": (np.subtract, two), "mul": (np.multiply, two)},
        **{"neg": (np.negative, one), "abs": (np.abs, one), "mov": (np.asarray, one)},
        "selp": (lambda a, b, p: np.where(p, a, b), (None, None, "pred")),
    }
    return by_name[name]


def _precisely(function):
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _flushing(function):
    return lambda *given: flush(function(*map(flush, given)))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign; all others as they are."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once.

    In float32 the product is exact in float64; rounding their sum twice goes wrong only where the first rounding ends
    in the middle of two float32 numbers, or beyond their precision. There, and in float64, as Boldo and Melquiond,
    Emulation of FMA and correctly rounded sums (2008): the sum is rounded to odd, which keeps whether it was exact.
    """
    if np.result_type(a, b, c) == np.float64:
        product, below = _two_product(a, b)
        upper, lower = _two_sum(c, below)
        total, rest = _two_sum(product, upper)
        return np.where(np.isfinite(total + rest + lower), total + _sum_to_odd(rest, lower), product + c)
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + c
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    doubtful = middle | ((np.abs(total) < _SMALLEST_NORMAL) & (total != 0))
    if doubtful.any():
        total = np.where(doubtful, _sum_to_odd(product, c), total)
    return total.astype(np.float32)


def _two_sum(a, b):
    """Rounded sum and its rounding error (Knuth)."""
    total = a + b
    kept = total - a
    return total, (a - (total - kept)) + (b - kept)


def _two_product(a, b):
    """Rounded product and its rounding error (Dekker), of factors below 2^970."""

    def halves(x):
        large = x * 134217729.0  # 2^27 + 1
        upper = large - (large - x)
        return upper, x - upper

    (a1, a2), (b1, b2), product = halves(a), halves(b), a * b
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _sum_to_odd(a, b):
    total, error = _two_sum(a, b)
    between = (error != 0) & np.isfinite(error) & ((total.view(np.int64) & 1) == 0)
    return np.where(between, np.nextafter(total, np.copysign(np.inf, error)), total)


def _compare(name, of_floats):
    by_name = {
        **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
        "ne": np.not_equal,
    }
    if not of_floats:
        return by_name[name]

    def ordered(a, b):
        return (a == a) & (b == b)

    if name in ("num", "nan"):
        return ordered if name == "num" else lambda a, b: ~ordered(a, b)
    if name.endswith("u"):  # or unordered
        return lambda a, b: by_name[name[:-1]](a, b) | ~ordered(a, b)
    return lambda a, b: by_name[name](a, b) & ordered(a, b)


def _divide(a, b):
    """Quotient towards zero, and remainder; of a division by zero all bits and the dividend."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient += (a - quotient * divisor != 0) & ((a < 0) != (divisor < 0))
    quotient = np.where(b == 0, ~b, quotient)
    return quotient, a - quotient * b


def _shift_right(a, n, bits):
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n < bits, moved, 0)


def _extract(a, at, count, bits):
    """Field of `count` bits from bit `at`, with its sign."""
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
    elif source[0] == "f" and len(rounding) == 1:
        compute = _rounded(_ROUND[rounding.pop()], dtype)
    else:
        raise KeyError(("cvt", *kinds, *how))
    return Operation(_flushing(compute) if "ftz" in how else compute, into, (source,))


def _rounded(function, dtype):
    """`function` and, for integers, the nearest there is, 0 of NaN."""
    if dtype.kind == "f":
        return lambda x: function(x).astype(dtype)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max

    def compute(x):
        whole = np.nan_to_num(function(x.astype(np.float64)), nan=0.0)
        inside = (whole >= least) & (whole < float(most) + 1)
        return np.where(
            inside, np.where(inside, whole, 0).astype(dtype), np.where(whole < 0, least, most).astype(dtype)
        )

    return compute
