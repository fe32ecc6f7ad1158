"""Ranks of the command under torchrun's agent, of which one is killed once in the middle of an epoch."""

import os
import signal
import sys

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from copgen_fast import train
from tests.helpers.distributed_ranks import when_at


def rank_main(arguments):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        when_at("step 4 of pretrain navigator", lambda: os.kill(os.getpid(), signal.SIGKILL))
    if code := train.main(arguments):
        sys.exit(code)


def launch(arguments):
    """What `torchrun --standalone --nproc-per-node 2 --max-restarts 1` does, but that ranks are forked."""
    torch.set_num_threads(1)
    config = LaunchConfig(
        1, 1, 2, run_id="killed", max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    elastic_launch(config, rank_main)(arguments)
