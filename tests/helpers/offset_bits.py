"""Fewest bits of an offset in compiled kernels of generators, as JSON: {side of the images: {kernel: [bits]}}."""

import json
import re
from importlib import import_module
from itertools import product

import torch

from bench.compile.kernels import compiling


def bits(code):
    """Of tensors of offsets that are computed, not constant as those between a pixel's four copies."""
    constant = set(re.findall(r"(%\w+) = arith\.constant", code))
    offsets = re.findall(r"tt\.addptr %\w+, (%\w+) : .*, tensor<\w+xi(\d+)>", code)
    return {int(number) for name, number in offsets if name not in constant}


def launch(side, layout):
    """Every kernel of generators on meta tensors [1, 2, side, side], which take no memory."""
    large, small = (
        torch.empty(1, 2, edge, edge, dtype=torch.float16, device="meta", memory_format=layout)
        for edge in (side, side // 2)
    )
    affine = torch.empty(1, 2, device="meta")
    add_upsampled, cond_norm = (import_module(f"copgen_fast.kernels.{name}") for name in ("add_upsampled", "cond_norm"))
    add_upsampled.add_upsampled(large, small, None, large)
    # Of a small image in a tensor that is as large as the other.
    sparse = large[..., ::4, ::4]
    add_upsampled.add_upsampled(small, sparse, None, small)
    add_upsampled.sum_by_four(large, small)
    for x in (large, small):
        cond_norm.cond_norm(x, affine, affine, x is small, large)
        cond_norm.cond_norm_backward(large, x, affine, affine, x is small, x, affine, affine)


def main(sides=(64, 2**15)):
    found = {side: {} for side in sides}
    for side, layout in product(sides, (torch.contiguous_format, torch.channels_last)):
        with compiling(75) as made:
            launch(side, layout)
        for kernel, compiled, _ in made:
            found[side].setdefault(kernel, []).append(min(bits(compiled.asm["ttir"])))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
