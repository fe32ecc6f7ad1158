"""Runs of two processes in which rank 1 goes missing, one way each; test_heartbeat.py starts them, all at once."""

import multiprocessing
import os
import signal
import threading

import torch
import torch.utils.tensorboard  # for all ranks: not in rank 0 while another waits for it
from torch import nn

from copgen_fast.errors import CopgenError, report
from copgen_fast.runtime import distributed
from copgen_fast.training import loop
from copgen_fast.training.grad_sync import data_parallel
from copgen_fast.training.loop import Plan, StepResult

TIMEOUT, MISSING_AT = 8.0, 3


def forever():
    threading.Event().wait()


def fail():
    raise ValueError("no such pair")


WAYS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "paused": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hanging": forever,
    "failing": fail,
    "stuck": forever,  # and rank 0 with it, where no exception comes from, as in a kernel of NCCL
    "absent": forever,  # from a barrier
}


def train(ranks, way, folder):
    model = data_parallel(nn.Linear(3, 1), ranks)

    def data(index):
        if index == MISSING_AT and ranks.rank == 1:
            WAYS[way]()
        return torch.ones(2, 3)

    def step(index, x):
        if index == MISSING_AT and way == "stuck":
            forever()
        if index == MISSING_AT and way == "absent":
            ranks.barrier("the barrier")
        loss = model(x).sum()
        loss.backward()
        return StepResult({"loss": loss}, {})

    loop.run(step, data, {"model": model}, Plan(way, folder / way, 6, 4, 1, 1), ranks=ranks)


def rank_main(rank, way, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.dup2(os.open(folder / f"{way}.{rank}", os.O_CREAT | os.O_WRONLY), 2)
    code = 0
    try:
        with distributed.joined(torch.device("cpu"), TIMEOUT) as ranks:
            train(ranks, way, folder)
    except CopgenError as error:
        code = report(error)
    distributed.leave(code)


def main(folder, ports):
    """Waits for the ranks 0, then ends what is left of the ranks 1; returns how many did not exit with 1."""
    torch.set_num_threads(1)
    start = multiprocessing.get_context("fork").Process
    runs = {way: [start(target=rank_main, args=(r, way, port, folder)) for r in (0, 1)] for way, port in ports.items()}
    for processes in runs.values():
        for process in processes:
            process.start()
    wrong = 0
    for first, second in runs.values():
        first.join(60)
        wrong += first.exitcode != 1
        for process in (first, second):
            process.kill()
            process.join()
    return wrong
