"""Lower bounds of an operation's time: its bytes at a measured bandwidth, its products at a measured rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from bench.harness import Call, Timing

# Bytes: more than a GPU's caches hold.
COPIED_BYTES = 512 * 2**20
# An RTX 2080 Ti's data sheet: bytes a second, and operations a second with sums in float32.
_TURING = 616e9
_TURING_RATE = {torch.float16: 53.8e12, torch.float32: 13.4e12}
# Rows of the square matrices that are multiplied to measure the rate.
SQUARE = {"cpu": 2048, "cuda": 8192}


# PyTorch's counter misses attention on CPUs.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, out_shape, **options: sdpa_flop_count(
        *shapes[:3]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, out_shape, **options: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}
ATTENTION_OF_CPU = {operator: shape_wrapper(count) for operator, count in _ATTENTION.items()}
"""Formulas of arguments and result, as PyTorch's registry has them."""


@dataclass(frozen=True)
class Limit:
    """A call to time among the candidates, and the limit in words and milliseconds from its time."""

    call: Call
    read: Callable[[Timing], tuple[str, float]]


def count_products(call: Call) -> int:
    """Floating-point operations of a call's matrix products and convolutions; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
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


def device_copy(what: str, moved: int, device: torch.device) -> Limit:
    """The time of moving `moved` bytes, reads and writes, at the rate of a large copy on the device."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def read(timing: Timing) -> tuple[str, float]:
        rate = 2 * COPIED_BYTES / (timing.ms / 1e3)
        words = (
            f"moving {moved / 1e6:.1f} MB ({what}) at the {rate / 1e12:.2f} TB/s of a device copy "
            f"(RTX 2080 Ti, estimate at 616 GB/s: {moved / _TURING * 1e3:.3f} ms)"
        )
        return words, moved / rate * 1e3

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
