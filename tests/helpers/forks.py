"""Ranks as forks of one process, in which what they import is imported once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch


def run_ranks(rank_main: Callable[..., None], world: int, *arguments: object) -> int:
    """Call `rank_main(rank, world, *arguments)` in a process for each rank; returns an exit code, 0 if all end well."""
    torch.set_num_threads(1)
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=rank_main, args=(rank, world, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)
