"""Errors a user can act on. `train` prints them as one line and exits with `exit_code`."""

from __future__ import annotations

import sys


class CopgenError(RuntimeError):
    """Something went wrong that its message fully explains; no traceback is needed."""

    exit_code = 1


class UsageError(CopgenError):
    """The command, a configuration value or a missing earlier artefact is at fault: nothing was run."""

    exit_code = 2


class CorruptArtifactError(CopgenError):
    """A file in the run folder is truncated or altered; the message names it."""


class NonFiniteError(CopgenError):
    """A NaN or an infinity appeared; the message names the step and the tensor."""


def report(error: CopgenError, process: str = "") -> int:
    """Print the one line that a command ends with; returns the command's exit code.

    Args:
        process: which of several it is.
    """
    sys.stderr.write(f"copgen_fast: {process}{': ' if process else ''}{error}\n")  # at once: others write there, too
    sys.stderr.flush()
    return error.exit_code
