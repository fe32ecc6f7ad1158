"""Shares of the machine: each of the processes side by side has a GPU and threads, and gives them back."""

import multiprocessing
import os

import pytest
import torch

from copgen_fast.presets import PRESETS
from copgen_fast.studies import _execute
from copgen_fast.studies._plan import Unit


@pytest.fixture
def machine(monkeypatch):
    """A machine of as many GPUs and cores as are said."""

    def has(gpus, cores, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr("copgen_fast.runtime.machine.cores", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


@pytest.mark.parametrize(
    ("gpus", "cores", "visible", "jobs", "device", "expected"),
    [
        (2, 8, None, None, "auto", [("0", 4), ("1", 4)]),
        (2, 8, "5,3", None, "auto", [("5", 4), ("3", 4)]),
        (2, 8, None, 3, "cuda", [("0", 2), ("1", 2), ("0", 2)]),
        (2, 8, None, 1, "auto", [("0", 8)]),
        (2, 8, None, None, "cpu", [(None, 2)] * 4),
        (0, 8, None, None, "auto", [(None, 2)] * 4),
        (0, 2, None, None, "auto", [(None, 2)]),
        (0, 2, None, 5, "auto", [(None, 1)] * 5),
    ],
)
def test_gpus_and_cores_are_shared_out(gpus, cores, visible, jobs, device, expected, machine):
    machine(gpus, cores, visible)
    assert [(slot.gpu, slot.threads) for slot in _execute.slots(jobs, device)] == expected


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_has_a_gpu_for_itself_and_gives_it_back_also_when_it_fails(tmp_path, monkeypatch, machine):
    machine(2, 2, "5,3")
    names = ["bad 0", "bad 1", *(f"good {number}" for number in range(4))]
    units = [Unit(name, tmp_path / name, (), PRESETS["quickstart"], (tmp_path / f"{name}.done",)) for name in names]

    def run(unit):
        taken = tmp_path / f"gpu {os.environ['CUDA_VISIBLE_DEVICES']}"
        taken.mkdir()  # fails where another run is on it
        with open(tmp_path / "used", "a") as file:
            file.write(f"{taken.name}\n")
        taken.rmdir()
        if unit.name.startswith("bad"):
            raise RuntimeError("no luck")
        unit.results[0].touch()
        return 0

    monkeypatch.setattr(_execute, "_run", run)
    monkeypatch.setattr(_execute, "prepare", lambda: multiprocessing.get_context("fork"))
    ended = {}
    failed = _execute.execute(
        units, tmp_path / "logs", _execute.slots(None, "auto"), lambda unit, error: ended.update({unit.name: error})
    )
    assert failed == 2 and set(ended) == set(names)
    assert {name for name, error in ended.items() if error} == {"bad 0", "bad 1"}
    assert "no luck" in ended["bad 0"]
    used = (tmp_path / "used").read_text().split("\n")[:-1]
    assert len(used) == len(names) and set(used) == {"gpu 5", "gpu 3"}
