"""The ranks of a run: which one this process is, its rows of a batch, collectives and barriers.

torchrun starts the processes and sets RANK, WORLD_SIZE and the like; without them a process is alone, and all of this
does nothing. Collectives use NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from copgen_fast.errors import CopgenError, UsageError, in_one_line
from copgen_fast.ops.info_nce.group import all_gather
from copgen_fast.runtime.heartbeat import Heartbeat, LostRankError, session


@dataclass(frozen=True, eq=False)
class Ranks:
    """The rank of this process and the number of ranks; by default it is alone.

    Only rank 0 writes files, logs and progress bars. Ranks have equally many rows of a batch.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def rows(self, count: int) -> slice:
        """This rank's part of `count` rows, which `expect_divisible` has found to divide."""
        share = count // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def joint_rows(self, pairs: int, views: int = 2) -> Tensor | slice:
        """This rank's part of a joint batch of views x pairs rows, anchors first, as an index; one alone has all."""
        if self.alone:
            return slice(None)
        return torch.arange(views * pairs).view(views, pairs)[:, self.rows(pairs)].flatten()

    def gathered(self, x: Tensor) -> Tensor:
        """x [N, ...] of all ranks in their order, [world N, ...], on each of them; no gradient passes."""
        return x if self.alone else all_gather(x, self.group)

    def mark(self, location: str, watchdog: bool = False) -> None:
        """`Heartbeat.mark`: where in the run this process is, for the messages of others should it go missing."""
        if self.heartbeat is not None:
            self.heartbeat.mark(location, watchdog)

    def barrier(self, location: str, message: str = "", while_alive: bool = False) -> list[str]:
        """`Heartbeat.barrier`: wait for all ranks; returns the message of each, in their order."""
        return [message] if self.heartbeat is None else self.heartbeat.barrier(location, message, while_alive)


ALONE = Ranks()


def world_size() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this process is rank 0, or alone."""
    return world_size() == 1 or os.environ.get("RANK") == "0"


def expect_divisible(argument: str, count: int) -> None:
    """Raises UsageError unless every process gets equally many of `count` rows."""
    world = world_size()
    if count % world:
        raise UsageError(
            f"{argument}: {count} rows are not divisible by {world} processes: choose a multiple of {world}, or "
            "another number of processes"
        )


def local_device(device: str) -> str:
    """`--device` for this process: of several on one host, each takes the GPU of its local rank.

    Raises:
        UsageError: fewer GPUs than processes, or one GPU named for several of them.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() == 1 or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device not in ("auto", "cuda"):
        if here > 1:
            raise UsageError(f"--device {device} names one device for {here} processes: choose cpu, cuda or auto")
        return device
    rank, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= found:
        raise UsageError(f"{here} processes on this host need as many GPUs, it has {found}: lower --nproc-per-node")
    return f"cuda:{rank}"


@contextlib.contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """Join the process group of the run for as long as the block lasts.

    Args:
        timeout: seconds that a collective or a barrier waits for a rank.

    Raises:
        UsageError: WORLD_SIZE is set and RANK, MASTER_ADDR or MASTER_PORT is not.
        LostRankError: another rank failed, died or hangs.
    """
    if world_size() == 1:
        yield Ranks()
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {world_size()} and {missing[0]} is not set: start the processes by torchrun, or unset it"
        )
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostRankError(f"no store of the run's processes at {where} in {timeout:g} s: is its host up?") from error
    store = dist.PrefixStore(session(store, rank, world, timeout), store)
    heartbeat = Heartbeat(dist.PrefixStore("heartbeat", store), rank, world, timeout)
    options = {"store": dist.PrefixStore("group", store), "rank": rank, "world_size": world}
    try:
        with _failures_reported(heartbeat):
            heartbeat.barrier("the start")
            if device.type == "cuda":
                torch.cuda.set_device(device)
                # NCCL's own watchdog aborts without a rank's name: the heartbeat's, at 1.5 x, should come first.
                dist.init_process_group("nccl", timeout=2 * limit, **options)
            else:
                dist.init_process_group("gloo", timeout=limit, **options)
            yield Ranks(rank, world, dist.group.WORLD, heartbeat)
            heartbeat.barrier("the end", while_alive=True)
    except BaseException:
        if device.type == "cpu":  # a GPU's may wait for the rank that is missing: see `leave`
            _close_group()
        raise
    else:
        _close_group()
    finally:
        heartbeat.close()


def leave(code: int) -> NoReturn:
    """Exit; without Python's clean-up, which would wait, where a collective may be pending on a GPU."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _close_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another rank is missing.

    gloo's errors are plain RuntimeErrors, known by the file that they name or, out of a backward, by their words alone.
    """
    words = r"/gloo/|NCCL|pair closure|connection (closed|reset) by peer|timed out waiting"
    named = isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or bool(named)


@contextlib.contextmanager
def _failures_reported(heartbeat: Heartbeat) -> Iterator[None]:
    """Tell the other ranks why this one stops; where a collective failed, find out which rank is the cause."""
    try:
        yield
    except LostRankError as error:
        heartbeat.failed(str(error), cause=False)
        raise
    except BaseException as error:
        if is_collective_error(error):
            missing = heartbeat.missing() or f"all ranks are alive, look at the network between them: {error}"
            heartbeat.failed(missing, cause=False)
            raise LostRankError(missing) from error
        heartbeat.failed(str(error) if isinstance(error, CopgenError) else in_one_line(error))
        raise
