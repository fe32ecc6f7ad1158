"""Lower bounds of an operation's time: bytes at a measured bandwidth, products at a measured rate, instructions."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from bench.harness import Call, Timing
from copgen_fast.ops import tiles

# Bytes: more than a GPU's caches hold.
COPIED_BYTES = 512 * 2**20
# An RTX 2080 Ti's data sheet: bytes a second, and operations a second with sums in float32.
_TURING = 616e9
_TURING_RATE = {torch.float16: 53.8e12, torch.float32: 13.4e12}
INSTRUCTIONS = Path(__file__).parent / "results" / "instructions.json"
# What a multiprocessor's four schedulers start in a cycle: an instruction of a warp each.
ISSUED = 4 * 32
# Rows of the square matrices that are multiplied to measure the rate.
SQUARE = {"cpu": 2048, "cuda": 8192}


def _of_tiles(x: torch.Size, weight: torch.Size, form: str, *others: object, out_shape: object) -> int:
    """Floating-point operations of a tiled convolution (`ops.tiles`), whose output is its last argument."""
    n, height, width, outputs = others[-1]
    side = 2 if form == "differences adjoint" else 4
    return 2 * weight[0] * n * math.ceil(height / side) * math.ceil(width / side) * x[3] * outputs


def _of_conv3x3(x: torch.Size, weight: torch.Size, *, out_shape: object) -> int:
    """Floating-point operations of the forward pass of `ops.conv3x3`, in Winograd's tiles."""
    n, channels, height, width = x
    return 2 * 36 * n * math.ceil(height / 4) * math.ceil(width / 4) * channels * weight[0]


def _of_its_gradients(
    grad: torch.Size, x: torch.Size, weight: torch.Size, with_x: bool, with_weight: bool, *, out_shape: object
) -> int:
    return (with_x + with_weight) * _of_conv3x3(x, weight, out_shape=None)


# PyTorch's counter misses these on CPUs.
_ON_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, out_shape, **options: sdpa_flop_count(
        *shapes[:3]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, out_shape, **options: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}
if tiles.built():
    _ON_CPUS[torch.ops.copgen_fast_cpp.convolve_tiles] = _of_tiles
    _ON_CPUS[torch.ops.copgen_fast.conv3x3] = _of_conv3x3
    _ON_CPUS[torch.ops.copgen_fast.conv3x3_backward] = _of_its_gradients
MORE_PRODUCTS = {operator: shape_wrapper(count) for operator, count in _ON_CPUS.items()}
"""Formulas of arguments and result, as PyTorch's registry has them."""


@dataclass(frozen=True)
class Limit:
    """A call to time among the candidates, and the limit in words and milliseconds from its time."""

    call: Call
    read: Callable[[Timing], tuple[str, float]]


def count_products(call: Call) -> int:
    """Floating-point operations of a call's matrix products and convolutions; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPUS) as counter:
        call()
    return counter.get_total_flops()


def copies(what: str, pairs: list[tuple[Tensor, Tensor]]) -> Limit:
    """The time of copying each pair's second tensor into the first."""
    read, written = (sum(pair[i].nbytes for pair in pairs) / 1e6 for i in (1, 0))
    words = f"copying {what}: {read:.1f} MB read, {written:.1f} MB written"

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return Limit(copy, lambda timing: (words, timing.ms))


@functools.cache
def instructions_per_pixel(architecture: str) -> dict[str, float]:
    """Of each of the augmentation's kernels, for a view with all colour ops; see bench/compile/instructions.py.

    Args:
        architecture: sm_75, or sm_90 for all newer ones.
    """
    rows = json.loads(INSTRUCTIONS.read_text())["rows"]
    return {row["kernel"]: row["per_pixel"] for row in rows if row["target"] == architecture}


def issue_rate(device: torch.device) -> float:
    """Instructions of threads that a GPU starts in a second at its highest clock."""
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count * ISSUED * gpu.clock_rate * 1e3


def device_copy(what: str, moved: int, device: torch.device, instructions: float = 0) -> Limit:
    """The time of moving `moved` bytes, reads and writes, at the rate of a large copy on the device.

    Or, where it is longer, that of starting `instructions` of threads.
    """
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def read(timing: Timing) -> tuple[str, float]:
        rate = 2 * COPIED_BYTES / (timing.ms / 1e3)
        words = (
            f"moving {moved / 1e6:.1f} MB ({what}) at the {rate / 1e12:.2f} TB/s of a device copy "
            f"(RTX 2080 Ti, estimate at 616 GB/s: {moved / _TURING * 1e3:.3f} ms)"
        )
        ms = moved / rate * 1e3
        if instructions:
            issuing = instructions / issue_rate(device) * 1e3
            words += f"; {instructions / 1e9:.2f} G instructions at the peak issue rate: {issuing:.3f} ms"
            ms = max(ms, issuing)
        return words, ms

    return Limit(lambda: target.copy_(source), read)


def matrix_products(what: str, operations: float, dtype: torch.dtype, device: torch.device) -> Limit:
    """The time of `operations` floating-point operations at the rate of a large matrix product on the device."""
    n = SQUARE[device.type]
    # Random numbers: zeros cost a GPU less power, and so run faster than anything real.
    left, right = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)

    def read(timing: Timing) -> tuple[str, float]:
        rate = 2 * n**3 / (timing.ms / 1e3)
        turing = operations / _TURING_RATE[torch.float16 if dtype == torch.bfloat16 else dtype] * 1e3
        words = (
            f"{operations / 1e9:.3g} GFLOP ({what}) at the {rate / 1e12:.3g} TFLOP/s of a {n} x {n} matrix product "
            f"(RTX 2080 Ti, estimate: {turing:.3g} ms)"
        )
        return words, operations / rate * 1e3

    return Limit(lambda: torch.mm(left, right, out=product), read)
