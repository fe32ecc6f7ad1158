import fcntl
import os
import shutil

import pytest
import torch
from hypothesis import settings

TINY = """quickstart --device cpu --log-every 1 --save-every 2
    --navigator.samples 64 --navigator.batch 16 --navigator.grid-every 32 --navigator.delta None
    --pairs.count 48 --pairs.shard-size 16 --pairs.batch 16 --pairs.workers 0
    --pairs.positives identity gaussian untrained-navigator navigator --positive.options
    --navigator.view-size None --pairs.size None --pretrain.augmentation digits
    --navigator.estimator.width 8 --pretrain.encoder.width 8 --pretrain.epochs 2 --pretrain.batch 16""".split()
"""The quickstart in seconds, with augmentation and pairs as the generator makes them; too short to learn anything."""

if not torch.cuda.is_available():
    # Triton reads it when it is imported: without a GPU its kernels are tested in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# Files of tests need not outlive a power cut; waiting for the disk takes longer than much of what they test.
os.fsync = lambda handle: None

# The same examples in every run: what fails here is what changed, not what was drawn; and no test is timed.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


LONG = (
    "csrc/test_address_sanitizer.py",
    "kernels/test_compile.py",
    "runtime/test_distributed.py",
    "kernels/test_augment.py",
    "studies/test_study.py",
    "kernels/test_info_nce.py",
    "csrc/test_info_nce_cuda.py",
    "kernels/test_ptx.py",
    "stages/test_pretrain.py",
    "test_train.py",
    "runtime/test_heartbeat.py",
    "docs/test_snippets.py",
    "training/test_cuda_graph.py",
    "stages/test_navigator.py",
    "stages/test_calibration.py",
    "generators/fit/test_resnet_gan.py",
    "stages/test_online.py",
    "kernels/test_launches.py",
)
"""Files that take longest, which start first, so that processes that share the tests end together."""


def pytest_collection_modifyitems(items):
    names = [f"tests/{name}" for name in LONG]
    items.sort(key=lambda item: next((n for n, name in enumerate(names) if item.nodeid.startswith(name)), len(LONG)))


def pytest_configure():
    """Two threads at most, here and in child processes: sums, and so bits, depend on their number.

    One in each of several processes that share the tests, unless TEST_THREADS says otherwise.
    """
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())
    threads = int(os.environ.get("TEST_THREADS", threads))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder with every stage of the tiny quickstart in it; tests only read it.

    Of several processes that share the tests, the first makes it for all; each has its own copy.
    """
    from copgen_fast.train import main

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            made = shared.with_suffix(".part")
            assert main([*TINY, "--out", str(made)]) == 0
            made.rename(shared)
    return shutil.copytree(shared, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of it for a test to change."""
    return shutil.copytree(finished_run, tmp_path / "run")
