"""Prints what the compiler makes of a kernel that writes `triangle` weights, for sm_75."""

import triton
import triton.language as tl
from copgen_fast.kernels.resize import triangle
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def weights(out, i, length, count):
    tl.store(out + tl.arange(0, 32), triangle(i, tl.arange(0, 32), length, count, tl.float32))


if __name__ == "__main__":
    signature = {"out": "*fp32", "i": "i32", "length": "i32", "count": "i32"}
    print(triton.compile(ASTSource(weights, signature), GPUTarget("cuda", 75, 32)).asm["ptx"])
