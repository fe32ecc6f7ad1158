"""Errors a user can act on. Commands print them as one line and exit with `exit_code`."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType


class CopgenError(RuntimeError):
    """Something went wrong that its message fully explains; no traceback is needed."""

    exit_code = 1


class UsageError(CopgenError):
    """The command, a configuration value or a missing earlier artefact is at fault: nothing was run."""

    exit_code = 2


class InUseError(UsageError):
    """Another command works in that folder now."""


class CorruptArtifactError(CopgenError):
    """A file in the run folder is truncated or altered; the message names it."""


class CorruptItemError(CorruptArtifactError):
    """One image of a data set can't be decoded; a loader may take another in its place."""


class NonFiniteError(CopgenError):
    """A NaN or an infinity appeared; the message names the step and the tensor."""


class ExhaustedError(CopgenError):
    """Memory or threads ran out; the message says what to do."""


Main = Callable[[list[str] | None], int]


def command(main: Main) -> Main:
    """Decorate the `main` of a command: what a user can act on ends in one line on stderr and an exit code.

    Warnings of this package are a line each, too.
    Characters that the terminal's encoding lacks are printed as escapes. A reader that closes the pipe, as `head` does,
    ends the command without a word, as it ends others (exit code 141).
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                with _warnings_of_one_line():
                    code = main(arguments)
            except SystemExit:  # after help
                print(end="", flush=True)
                raise
            print(end="", flush=True)  # what failed only as Python exits would end in a traceback
            return code
        except BrokenPipeError:
            _discard_output()
            return 141
        except KeyboardInterrupt:
            return report(CopgenError("interrupted"), 130)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            _discard_output()
            return report(line)

    return wrapped


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """While the block lasts, this package's warnings are printed as a line each, without the code that gives them."""
    formatted, package = warnings.formatwarning, os.path.dirname(__file__) + os.sep

    def in_a_line(message: Warning | str, category: type[Warning], filename: str, *where: object) -> str:
        if category is UserWarning and filename.startswith(package):
            return f"warning: {message}\n"
        return formatted(message, category, filename, *where)

    warnings.formatwarning = in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = formatted


def explain(error: Exception) -> CopgenError | None:
    """The error that says what a user can do about another one; None for a fault of the program."""
    if isinstance(error, ExhaustedError):
        return error
    cause = error.__cause__ if isinstance(error, CopgenError) else error
    while cause is not None:  # a file that memory does not suffice for is no damaged file
        # Of what an error of ours stands for, EAGAIN is a lock that another process holds.
        if (what := exhausted(cause)) and (cause is error or not isinstance(cause, BlockingIOError)):
            return ExhaustedError(what)
        cause = cause.__cause__
    if isinstance(error, CopgenError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return CopgenError(error.strerror + "".join(f": {name}" for name in (error.filename, error.filename2) if name))
    return None


def explain_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook that ends in one line where `command` would, and else in a traceback."""
    if isinstance(error, Exception) and (known := explain(error)):
        report(known)
    else:
        sys.__excepthook__(kind, error, trace)


_NO_MEMORY = r"out of memory|(can't|[Cc]annot|[Uu]nable to) allocate|bad_alloc|not enough memory|failed to map segment"
_NO_THREAD = "can't start new thread|Resource temporarily unavailable"


def exhausted(error: BaseException, remedy: str = "free some, or raise its limit (ulimit -v)") -> str | None:
    """What ran out, in one line with what to do: memory, or threads. None for another error.

    Args:
        remedy: for memory.
    """
    if isinstance(error, CopgenError) or not isinstance(error, Exception):
        return None
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or re.search(_NO_MEMORY, text):
        size = re.search(r"tried to allocate (\d+) bytes", text)
        what = f"out of memory, {int(size[1]) / 1e6:,.0f} MB more were needed" if size else text.partition(". GPU")[0]
        what = what.splitlines()[0] if what else "out of memory"
        return f"{what if 'out of memory' in what else f'out of memory ({what})'}: {remedy}"
    if number == errno.EAGAIN or re.search(_NO_THREAD, text):
        return (
            f"no thread or process could be started ({text.splitlines()[0]}): raise the limit (ulimit -u), or choose "
            "fewer by OMP_NUM_THREADS, --pairs.workers and --pretrain.workers"
        )
    return None


USER_MODULE = "copgen_fast_user_"
"""How names of modules begin that are imported from a user's files."""
_LONGEST = 200


def in_one_line(error: BaseException) -> str:
    """What other code raised: kind, message without line breaks and, where a user's file raised it, the place there."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [x for x in frames if x[0].f_globals.get("__name__", "").startswith(USER_MODULE)]
    where = f" (line {own[-1][1]} of {os.path.basename(own[-1][0].f_code.co_filename)})" if own else ""
    return type(error).__name__ + (f": {text}" if text else "") + where


def report(error: CopgenError, exit_code: int | None = None) -> int:
    """Print the one line that a command ends with; returns its exit code."""
    with contextlib.suppress(OSError):  # the pipe is closed
        # At once, as others write there, too.
        sys.stderr.write(f"copgen_fast: {process()}{': ' if process() else ''}{error}\n")
        sys.stderr.flush()
    return error.exit_code if exit_code is None else exit_code


def process() -> str:
    """Which of the processes that torchrun started this is, for messages; empty for one that is alone."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK', '?')}" if several else ""


def _discard_output() -> None:
    """Send what can't be written any more to /dev/null: Python would try again, and complain, as it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except AttributeError:  # None: it was closed before
            pass
