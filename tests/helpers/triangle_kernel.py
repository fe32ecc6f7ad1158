"""Kernels that use `triangle` weights; as a program it prints what the compiler makes of one, for sm_75."""

import triton
import triton.language as tl
from copgen_fast.kernels.resize import triangle
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def weights(out, i, length, count):
    tl.store(out + tl.arange(0, 32), triangle(i, tl.arange(0, 32), length, count, tl.float32))


@triton.jit(do_not_specialize=("length", "first"))
def weighed(pixels, total, length, first, OLD: tl.constexpr):
    """Sum of the pixels of a row from `first` on by their weights in an only output pixel; OLD: as these once were."""
    j = first - 1 + tl.arange(0, 64)
    if OLD:
        distance = tl.abs(length - (2 * j + 1))
        weight = tl.maximum(1 - distance.to(tl.float32) * (1 / (2 * length).to(tl.float32)), 0.0)
    else:
        weight = triangle(0, j, length, 1, tl.float32)
    tl.store(total, tl.sum(weight * tl.load(pixels + (j - first), weight > 0, 0.0)))


if __name__ == "__main__":
    signature = {"out": "*fp32", "i": "i32", "length": "i32", "count": "i32"}
    print(triton.compile(ASTSource(weights, signature), GPUTarget("cuda", 75, 32)).asm["ptx"])
