"""Limits: bytes at the rate of a copy, products at the rate of a matrix product."""

import pytest
import torch

from bench import limits
from bench.harness import Timing


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
