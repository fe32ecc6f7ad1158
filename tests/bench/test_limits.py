"""Limits: bytes at the rate of a copy, products at the rate of a matrix product."""

from types import SimpleNamespace

import pytest
import torch

from bench import limits
from bench.harness import Timing


@pytest.mark.parametrize(("instructions", "ms"), [(100, 2), (49_152, 3)], ids=["bytes", "instructions"])
def test_a_gpus_limit_is_the_longer_of_bytes_and_instructions(monkeypatch, instructions, ms):
    """64 multiprocessors start 128 instructions in each cycle of half a millisecond: 16,384 a millisecond."""
    gpu = SimpleNamespace(multi_processor_count=64, clock_rate=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(limits, "COPIED_BYTES", 1000)
    _, found = limits.device_copy("all", 500, torch.device("cpu"), instructions).read(Timing(8.0, 1, 5))
    assert found == pytest.approx(ms)


def test_limits_scale_a_measured_rate(monkeypatch):
    monkeypatch.setattr(limits, "COPIED_BYTES", 1000)
    bound = limits.device_copy("all", 500, torch.device("cpu"))
    bound.call()
    words, milliseconds = bound.read(Timing(8.0, 1, 5))
    assert milliseconds == pytest.approx(2)  # a quarter of the 2000 bytes that were copied in 8 ms
    assert "estimate" in words
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 10})
    bound = limits.matrix_products("all", 1000, torch.float32, torch.device("cpu"))
    bound.call()
    words, milliseconds = bound.read(Timing(8.0, 1, 5))
    assert milliseconds == pytest.approx(4)  # half of the 2 * 10^3 operations that took 8 ms
    assert "estimate" in words
