"""Running a study's commands, several side by side, each in a separate process.

Each process holds the lock of its run folder, so that several study commands, on other hosts too, share one study: a
folder in use is passed over and looked at again. A failed run is told in one line, and others go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from copgen_fast import train
from copgen_fast.errors import InUseError, command
from copgen_fast.runtime import artifacts, machine
from copgen_fast.runtime.interrupts import Interrupted, stop_requested
from copgen_fast.studies._plan import Unit, link

Tell = Callable[[Unit, str | None], None]
"""Called with each unit that ended and, where it failed, why."""

_BUSY = 75
"""Exit code of a process that found its folder in use."""
_LOOK_EVERY = 1.0
"""Seconds between looks at folders that other commands use, and at requests to stop."""

_LATE = ("sklearn.datasets", "torch.utils.tensorboard")
"""Modules that stages import once they need them, which takes longer than a small run."""


@dataclass(frozen=True)
class Slot:
    """What one of the processes side by side has of the machine.

    Attributes:
        gpu: its CUDA_VISIBLE_DEVICES; None: as it is.
        threads: for operators on the CPU.
    """

    gpu: str | None
    threads: int


def slots(jobs: int | None, device: str) -> list[Slot]:
    """A slot a process: `jobs`, or one for each GPU; on the CPU one for each two cores. GPUs and cores are shared out.

    Args:
        device: the runs' `--device`.
    """
    gpus = _gpus() if device in ("auto", "cuda") else []
    cores = machine.cores()
    jobs = jobs or len(gpus) or max(1, cores // 2)
    threads = max(1, min(torch.get_num_threads(), cores // jobs))  # OMP_NUM_THREADS may say fewer
    return [Slot(gpus[number % len(gpus)] if gpus else None, threads) for number in range(jobs)]


def _gpus() -> list[str]:
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def prepare() -> ForkServerContext:
    """Start to import, in a server that processes are forked from, what all of them need."""
    context = multiprocessing.get_context("forkserver")
    # All of the package that is loaded here: each process loads the main module anew, and what that needs is there.
    loaded = [name for name in sys.modules if name.partition(".")[0] == "copgen_fast"]
    context.set_forkserver_preload([*loaded, *_LATE])
    forkserver.ensure_running()
    return context


def execute(units: Sequence[Unit], logs: Path, places: Sequence[Slot], tell: Tell) -> int:
    """Run the units that are not done, each after those that it links; returns how many failed.

    Args:
        units: in the order in which they are tried, needed ones before those that need them.
        logs: folder of what each process prints, and of why it failed.

    Raises:
        Interrupted: a stop was requested; processes have saved what they do.
    """
    context = prepare()
    waiting, free = list(units), list(places)
    failed: dict[Path, str] = {}
    running: dict[BaseProcess, tuple[Unit, Slot]] = {}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            if stop_requested():
                raise Interrupted("stopped: what is finished stays, and the same command goes on with the rest")
            for process in [process for process in running if process.exitcode is not None]:
                unit, slot = running.pop(process)
                free.append(slot)
                _ended(unit, process.exitcode, logs, waiting, failed, tell)
            _settle(waiting, failed, tell)
            while free and (unit := _next(waiting)):
                waiting.remove(unit)
                slot = free.pop(0)
                error_file(logs, unit).unlink(missing_ok=True)
                process = context.Process(target=_work, args=(unit, str(log_file(logs, unit)), slot))
                process.start()
                running[process] = unit, slot
            if waiting or running:
                _sleep([process.sentinel for process in running])
    finally:
        _stop(list(running))
    return len(failed)


def _sleep(sentinels: list[int]) -> None:
    """Wait until a process ends, or it is time to look again."""
    if sentinels:
        wait(sentinels, _LOOK_EVERY)
    else:
        time.sleep(_LOOK_EVERY)


def _settle(waiting: list[Unit], failed: dict[Path, str], tell: Tell) -> None:
    """Take out what is done, perhaps by another command, and what can't be as a unit that it needs failed."""
    for unit in list(waiting):
        if unit.done:
            waiting.remove(unit)
            tell(unit, None)
        elif lost := next((need for need in unit.needs if need.folder in failed), None):
            waiting.remove(unit)
            failed[unit.folder] = f"{lost.name}: {failed[lost.folder]}"
            tell(unit, failed[unit.folder])


def _next(waiting: list[Unit]) -> Unit | None:
    """The first unit that can run now: what it needs is done, and no other command holds its folder."""
    return next((unit for unit in waiting if all(need.done for need in unit.needs) and not _in_use(unit)), None)


def _in_use(unit: Unit) -> bool:
    try:
        with artifacts.folder_lock(unit.folder):
            return False
    except InUseError:
        return True


def _ended(unit: Unit, code: int, logs: Path, waiting: list[Unit], failed: dict[Path, str], tell: Tell) -> None:
    if code == _BUSY:
        waiting.append(unit)
    elif code == 0 and unit.done:
        tell(unit, None)
    else:
        failed[unit.folder] = why = f"{_reason(code, log_file(logs, unit))} (see {log_file(logs, unit)})"
        artifacts.write_bytes(error_file(logs, unit), f"{why}\n".encode())
        tell(unit, why)


def log_file(logs: Path, unit: Unit) -> Path:
    """What the unit's last process printed."""
    return logs / f"{'.'.join(unit.folder.parts[-2:])}.log"


def error_file(logs: Path, unit: Unit) -> Path:
    """Why the unit failed, one line; missing where it did not, or is tried again."""
    return log_file(logs, unit).with_suffix(".error")


def _reason(code: int, log: Path) -> str:
    """Why a process failed, in one line: the signal that killed it, or the last line that it printed."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        if told := [line for line in lines if line]:
            return told[-1].removeprefix("copgen_fast: ")[:500]
    return f"exit code {code}"


def _stop(processes: list[BaseProcess]) -> None:
    """End processes: they save first. A second Ctrl-C kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def _work(unit: Unit, log: str, slot: Slot) -> None:
    """Run one unit: what each child process does."""
    os.setpgrp()  # Ctrl-C reaches the study alone, which stops its processes
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    threading.Thread(target=_follow_parent, daemon=True).start()
    if slot.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    torch.set_num_threads(slot.threads)
    sys.exit(_run(unit))


def _follow_parent() -> None:
    """Stop as the study's own process has died."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(unit: Unit) -> int:
    @command
    def main(arguments: list[str] | None) -> int:
        try:
            train.execute(unit.config, partial(link, unit.links))
        except InUseError:
            return _BUSY
        return 0

    return main([])
