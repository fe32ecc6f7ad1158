"""The SLURM job gives torchrun only the options that it has."""

import os
import subprocess

import pytest

from tests.docs.pages import ROOT


@pytest.mark.parametrize("options", ["--max-restarts", "--max-restarts --shutdown-timeout"])
def test_a_torchrun_without_a_shutdown_timeout_is_given_none(options, tmp_path):
    torchrun = f'if [ "$1" = --help ]; then echo "{options}"; else printf "%s\\n" "$@"; fi'
    for name, does in {"scontrol": "echo node", "srun": 'shift; exec "$@"', "torchrun": torchrun}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "node", "JOB_ID": "7", "NNODES": "1", "CPUS_PER_TASK": "8", "SUBMIT_DIR": str(tmp_path)}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), "cifar10"]
    given = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert ("--shutdown-timeout=120" in given) == ("--shutdown-timeout" in options)
