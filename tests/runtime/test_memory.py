import os
from pathlib import Path

import pytest
import torch

from copgen_fast.runtime import memory
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


def test_limits_of_control_groups_around_the_process_count(tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    for folder, limit, used in (("job", "9000000", 4_000_000), ("job/step", "max", 1_000_000)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(limit + "\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 7\ninactive_file 2000000\n")
    assert available_memory(torch.device("cpu")) == pytest.approx(7)


def test_the_limit_of_addresses_counts(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda of: (0, 0))
    assert available_memory(torch.device("cpu")) == 0
