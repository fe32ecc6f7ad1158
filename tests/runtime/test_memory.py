import os
from pathlib import Path

import pytest
import torch

from copgen_fast.runtime.memory import available_memory, peak_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel is not Linux")


def test_peak_memory_counts_what_is_freed_within_the_call():
    def call():
        first = torch.ones(10_000_000)
        second = torch.ones(5_000_000)
        del first
        return second

    call()
    assert peak_memory(call) == pytest.approx(60, abs=6)


def test_some_of_what_there_is_is_available():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    assert 10 < available_memory(torch.device("cpu")) < total
