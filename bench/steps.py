"""What the areas of whole training steps share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import Call
from bench.limits import Limit, matrix_products
from copgen_fast.config import RunConfig
from copgen_fast.stages import Run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Samples of a step that takes seconds: in two minutes there is no time for more.
LEAST = 3


def precisions(device: torch.device, of_gpus: tuple[str, ...]) -> tuple[str, ...]:
    """Those to measure here. A CPU has float32, and bf16 where it has instructions for it: elsewhere it emulates it."""
    if device.type != "cpu":
        return of_gpus
    able = torch.cpu.get_capabilities()
    if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"):
        return ("fp32", "bf16")
    print("left out: bf16 (this CPU has no instructions for it)", flush=True)
    return ("fp32",)


def products(what: str, batch: int, step: Call, precision: str, device: torch.device) -> Limit:
    """The products of a step, counted as it computes them, at the rate of a large product in its precision."""
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    return matrix_products(f"{what}: {operations / batch / 1e9:.3g} a sample", operations, DTYPES[precision], device)


def run(config: RunConfig, device: torch.device) -> Run:
    """A run that writes nothing."""
    return Run(config, Path(), device)
