"""The SLURM job, run with stand-ins for what a cluster has: bash reads it, torchrun and train know its options."""

import os
import subprocess

import pytest
from torch.distributed.run import get_args_parser

from copgen_fast import train
from tests.docs.pages import ROOT


@pytest.fixture
def given(tmp_path, request):
    """What the job gives torchrun, whose help shows these options."""
    torchrun = f'if [ "$1" = --help ]; then echo "{request.param}"; else printf "%s\\n" "$@"; fi'
    for name, does in {"scontrol": "echo first-node", "srun": 'shift; exec "$@"', "torchrun": torchrun}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "first-node,second-node", "JOB_ID": "7", "NNODES": "2", "CPUS_PER_TASK": "32"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), "cifar10"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("given", ["--max-restarts"], indirect=True)
def test_torchrun_and_train_know_the_options(given, tmp_path):
    module = given.index("copgen_fast.train")
    known = get_args_parser().parse_args([*given[: module + 1]])
    assert (known.nnodes, known.nproc_per_node, known.rdzv_endpoint) == ("2", "4", "first-node:20007")
    config = train.parse(given[module + 1 :])
    assert (config.bn, config.timeout, config.out) == ("sync", 300, f"{tmp_path}/runs/cifar10")
    assert "--shutdown-timeout=120" not in given, "a torchrun without that option is given none"


@pytest.mark.parametrize("given", ["--max-restarts --shutdown-timeout"], indirect=True)
def test_a_torchrun_with_a_shutdown_timeout_is_given_one(given):
    assert "--shutdown-timeout=120" in given
